"""Decoders on disk as Hugging Face stores them: `config.json` beside safetensors."""

import hashlib
import json
from collections.abc import Mapping
from math import prod
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from qpaged.models._extras import need
from qpaged.models._shards import (
    DTYPES,
    INDEX_FILE,
    WEIGHTS_FILE,
    StoredTensor,
    read_json,
    stored_tensors,
    weight_files,
)
from qpaged.models.config import DecoderConfig
from qpaged.models.decoder import OUTPUT, Params, param_shapes
from qpaged.models.families import decoder_config, llama_fields

CONFIG_FILE = "config.json"

LAYOUTS = (
    ("model.", "lm_head."),
    ("language_model.model.", "language_model.lm_head."),
    ("model.language_model.", "lm_head."),
)
"""What names of a decoder's weights and of its output matrix start with: alone, and beside a vision tower."""

BUFFERS = ("rotary_emb.inv_freq",)
"""Tensors of a layer that older checkpoints store though they follow from the configuration."""


def read_config(path: str | Path) -> DecoderConfig:
    """The configuration of a checkpoint, from its directory or its `config.json`; no weights are needed.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a family or feature that is not implemented, or a malformed file.
    """
    path = _config_path(path)
    found = read_json(path)
    try:
        return decoder_config(found)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def load_checkpoint(directory: str | Path, dtype: DTypeLike | None = None) -> tuple[DecoderConfig, Params]:
    """The configuration and weights of a checkpoint of one file or of shards, weights cast to `dtype`.

    Weights keep their stored dtypes if None. They are read one by one: no more than the model and the tensor
    being read is in memory, and tensors that the decoder does not use are not read. The embedding is the
    output matrix where the checkpoint has none.

    Raises:
        FileNotFoundError: a missing file.
        ValueError: a family or feature that is not implemented, a missing or misshapen tensor, a damaged
            file.
        ImportError: safetensors is missing.
    """
    path = _config_path(directory)
    config, tensors = _used_tensors(path)
    if tensors is None:
        raise _no_weights(path.parent)
    return config, {name: tensor.read(dtype) for name, tensor in tensors.items()}


def parameter_bytes(path: str | Path) -> int | None:
    """Bytes of the weights that `load_checkpoint` reads, from the files' headers; None where there are none.

    `path` is as in `read_config`. Raises as `load_checkpoint`.
    """
    _, tensors = _used_tensors(_config_path(path))
    if tensors is None:
        return None
    return sum(prod(tensor.shape) * DTYPES[tensor.dtype].itemsize for tensor in tensors.values())


def checkpoint_sha256(directory: str | Path) -> str:
    """SHA-256 of a checkpoint: of `sha256sum`'s lines for its `config.json` and its weights' files, by name.

    Raises:
        FileNotFoundError: a missing file.
        ValueError: a malformed index.
    """
    directory = Path(directory)
    files = [_config_path(directory), *weight_files(directory)]
    if len(files) == 1:
        raise _no_weights(directory)
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            digest.update(f"{hashlib.file_digest(file, 'sha256').hexdigest()}  {path.name}\n".encode())
    return digest.hexdigest()


def save_checkpoint(
    directory: str | Path, config: DecoderConfig, params: Params, dtype: DTypeLike = jnp.bfloat16
) -> None:
    """Write a plain Llama's checkpoint, which `load_checkpoint` and Hugging Face's `LlamaForCausalLM` read.

    Weights are stored as `dtype`. Creates the directory; replaces a checkpoint that is already there.

    Raises:
        ValueError: another decoder than a plain Llama, or weights that do not fit the configuration.
        ImportError: safetensors is missing.
    """
    directory = Path(directory)
    fields = llama_fields(config) | {"torch_dtype": jnp.dtype(dtype).name}
    for name, shape in param_shapes(config).items():
        _check_weight(name, shape, {key: value.shape for key, value in params.items()}, "params")
    weights = {name: np.asarray(params[name]).astype(jnp.dtype(dtype)) for name in param_shapes(config)}
    # Transformers refuses a file that does not say which framework's layout it follows.
    data = need("safetensors.numpy").save(weights, metadata={"format": "pt"})
    directory.mkdir(parents=True, exist_ok=True)
    _replace_file(directory / WEIGHTS_FILE, data)
    _replace_file(directory / CONFIG_FILE, (json.dumps(fields, indent=2) + "\n").encode())


def _replace_file(path: Path, data: bytes) -> None:
    """Write a file in one step, so that a reader never meets half of it."""
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(data)
    partial.replace(path)


def _config_path(path: str | Path) -> Path:
    path = Path(path)
    path = path / CONFIG_FILE if path.is_dir() or path.suffix != ".json" else path
    if path.is_file():
        return path
    raise FileNotFoundError(
        f"There is no {path}. Give the directory of a checkpoint, with its {CONFIG_FILE}."
    )


def _no_weights(directory: Path) -> Exception:
    pickled = sorted(directory.glob("pytorch_model*.bin"))
    if pickled:
        return ValueError(
            f"{directory} has its weights in {pickled[0].name}, but only safetensors can be loaded. "
            "Convert them: load the model with transformers and save it with save_pretrained."
        )
    return FileNotFoundError(
        f"There is no {directory / WEIGHTS_FILE}, and no {INDEX_FILE}. Give a directory with weights."
    )


def _used_tensors(path: Path) -> tuple[DecoderConfig, dict[str, StoredTensor] | None]:
    """A configuration, and the tensors beside it that its decoder uses, by their name in `param_shapes`."""
    config, stored = read_config(path), _canonical(stored_tensors(path.parent))
    if not stored:
        return config, None
    shapes = param_shapes(config)
    found = {name: tensor.shape for name, tensor in stored.items()}
    for name, shape in shapes.items():
        _check_weight(name, shape, found, str(path.parent))
    _check_understood(config, stored)
    return config, {name: stored[name] for name in shapes}


def _canonical(stored: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Tensors by the name that they have in a checkpoint of text alone."""
    model, output = next((layout for layout in LAYOUTS if layout[0] + "norm.weight" in stored), LAYOUTS[0])
    new = {output: "lm_head.", model: "model."}
    prefixes = {name: next((prefix for prefix in new if name.startswith(prefix)), None) for name in stored}
    return {new[p] + name.removeprefix(p): stored[name] for name, p in prefixes.items() if p is not None}


def _check_weight(
    name: str, shape: tuple[int, ...], found: Mapping[str, tuple[int, ...]], where: str
) -> None:
    if name not in found:
        raise ValueError(
            f"{where} has no tensor {name!r}, which the configuration calls for. "
            "Copy all files of the checkpoint again."
        )
    if found[name] != shape:
        raise ValueError(
            f"{where} has {name!r} of shape {found[name]}, but the configuration calls for {shape}. "
            "Use the configuration and the weights of one checkpoint."
        )


def _check_understood(config: DecoderConfig, stored: Mapping[str, StoredTensor]) -> None:
    """Every tensor of the decoder is used: a bias, norm or scale left out would change what it computes."""
    shapes = param_shapes(config)
    for name, tensor in stored.items():
        if not (name in shapes or name == OUTPUT or name.endswith(BUFFERS)):
            raise ValueError(
                f"{tensor.path} has the tensor {tensor.name!r}, for which the configuration's decoder has no "
                "use. Choose a checkpoint without it."
            )
        if name in shapes and tensor.dtype not in DTYPES:
            raise ValueError(
                f"{tensor.path} stores {tensor.name!r} as {tensor.dtype}, but only "
                f"{', '.join(DTYPES)} can be loaded. Choose a checkpoint with such weights."
            )
