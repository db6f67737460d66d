"""A reference decoder, its checkpoints and tokenizers, and a tiny model that comes with the package.

The decoder computes Llama 2 and 3, Mistral, Mixtral, Qwen 2 and 3, Qwen 3 MoE, Gemma 2 and 3 and Phi-3, from
the checkpoints that Hugging Face stores.
"""

from pathlib import Path

import jax.numpy as jnp

from qpaged.models._sizes import CacheSizes, read_cache_sizes
from qpaged.models._weights import weights_bytes
from qpaged.models.checkpoint import (
    checkpoint_sha256,
    load_checkpoint,
    parameter_bytes,
    read_config,
    save_checkpoint,
)
from qpaged.models.config import AttentionOptions, DecoderConfig
from qpaged.models.decoder import (
    Attend,
    Params,
    final_hidden,
    forward,
    init_params,
    output_logits,
    param_shapes,
)
from qpaged.models.experts import Experts
from qpaged.models.rope import LinearScaling, Llama3Scaling, LongRopeScaling, Rope, YarnScaling
from qpaged.models.scales import read_scales, write_scales
from qpaged.models.text import standard_library_files, standard_library_text
from qpaged.models.tokenizer import Tokenizer, Tokens, load_tokenizer

__all__ = [
    "Attend",
    "AttentionOptions",
    "CacheSizes",
    "DecoderConfig",
    "Experts",
    "LinearScaling",
    "Llama3Scaling",
    "LongRopeScaling",
    "Params",
    "Rope",
    "Tokenizer",
    "Tokens",
    "YarnScaling",
    "checkpoint_sha256",
    "final_hidden",
    "forward",
    "init_params",
    "load_checkpoint",
    "load_tiny",
    "load_tokenizer",
    "output_logits",
    "param_shapes",
    "parameter_bytes",
    "read_cache_sizes",
    "read_config",
    "read_scales",
    "save_checkpoint",
    "standard_library_files",
    "standard_library_text",
    "weights_bytes",
    "write_scales",
]


def load_tiny() -> tuple[DecoderConfig, Params]:
    """Load the bundled byte-level decoder: tokens are bytes 0 to 255, context up to 1024, weights as float32.

    It was trained by `benchmarks/train_tiny.py` on the "train" split of `standard_library_text`. Raises
    `ImportError` without safetensors.
    """
    return load_checkpoint(Path(__file__).parent / "tiny", jnp.float32)
