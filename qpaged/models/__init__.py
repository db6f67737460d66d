"""A reference Llama-family decoder, its checkpoints, and a tiny one that comes with the package."""

from pathlib import Path

from qpaged.models.checkpoint import load_checkpoint, save_checkpoint
from qpaged.models.llama import Attend, LlamaConfig, Params, forward, init_params, param_shapes
from qpaged.models.text import standard_library_files, standard_library_text

__all__ = [
    "Attend",
    "LlamaConfig",
    "Params",
    "forward",
    "init_params",
    "load_checkpoint",
    "load_tiny",
    "param_shapes",
    "save_checkpoint",
    "standard_library_files",
    "standard_library_text",
]


def load_tiny() -> tuple[LlamaConfig, Params]:
    """The bundled byte-level decoder: tokens are bytes 0 to 255, context up to 1024, weights as float32.

    Trained by `benchmarks/train_tiny.py` on the "train" split of `standard_library_text`. Raises
    `ImportError` without safetensors.
    """
    return load_checkpoint(Path(__file__).parent / "tiny")
