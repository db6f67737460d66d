"""Decoders on disk as Hugging Face stores them: `config.json` beside one `model.safetensors`."""

import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from types import ModuleType
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from qpaged.models.llama import LlamaConfig, Params, param_shapes

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"

# Fields that change what a Llama computes, with the value that means "as in `qpaged.models.llama`".
PLAIN = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "rope_scaling": None}


def load_checkpoint(directory: str | Path, dtype: DTypeLike = jnp.float32) -> tuple[LlamaConfig, Params]:
    """The configuration and weights of a Llama checkpoint, weights cast to `dtype`.

    Tensors that the decoder does not use are not read. Raises `FileNotFoundError` for a missing file,
    `ValueError` for a model that is not a plain Llama, a missing or misshapen tensor or a damaged file, and
    `ImportError` without safetensors.
    """
    directory = Path(directory)
    config = _read_config(directory)
    return config, _read_weights(_existing_file(directory, WEIGHTS_FILE), config, dtype)


def save_checkpoint(
    directory: str | Path, config: LlamaConfig, params: Params, dtype: DTypeLike = jnp.bfloat16
) -> None:
    """Write a checkpoint that `load_checkpoint` and Hugging Face's `LlamaForCausalLM` read.

    Weights are stored as `dtype`. Creates the directory; replaces a checkpoint that is already there. Raises
    `ValueError` where the weights do not fit the configuration, `ImportError` without safetensors.
    """
    directory = Path(directory)
    for name, shape in param_shapes(config).items():
        _check_weight(name, shape, {key: value.shape for key, value in params.items()}, "params")
    weights = {name: np.asarray(params[name]).astype(jnp.dtype(dtype)) for name in param_shapes(config)}
    # Transformers refuses a file that does not say which framework's layout it follows.
    data = _safetensors().numpy.save(weights, metadata={"format": "pt"})
    directory.mkdir(parents=True, exist_ok=True)
    _replace_file(directory / WEIGHTS_FILE, data)
    _replace_file(
        directory / CONFIG_FILE, (json.dumps(_config_fields(config, dtype), indent=2) + "\n").encode()
    )


def _replace_file(path: Path, data: bytes) -> None:
    """Write a file in one step, so that a reader never meets half of it."""
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(data)
    partial.replace(path)


def _config_fields(config: LlamaConfig, dtype: DTypeLike) -> dict[str, Any]:
    header = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    return header | asdict(config) | PLAIN | {"torch_dtype": jnp.dtype(dtype).name}


def _read_config(directory: Path) -> LlamaConfig:
    path = _existing_file(directory, CONFIG_FILE)
    try:
        found = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON ({error}). Copy the file again.") from error
    _check_plain_llama(found, path)
    found.setdefault("head_dim", found.get("hidden_size", 0) // found.get("num_attention_heads", 1))
    found.setdefault("num_key_value_heads", found.get("num_attention_heads"))
    # Newer files keep the base of the rotary angles one level down.
    found.setdefault("rope_theta", (found.get("rope_parameters") or {}).get("rope_theta", 10000.0))
    known = {field.name: found[field.name] for field in fields(LlamaConfig) if field.name in found}
    try:
        return LlamaConfig(**known)
    except TypeError as error:
        raise ValueError(f"{path} lacks a size of the model ({error}). Copy the file again.") from error


def _check_plain_llama(found: Mapping[str, Any], path: Path) -> None:
    if found.get("model_type") != "llama":
        raise ValueError(
            f'{path} says model_type {found.get("model_type")!r}, but only "llama" can be loaded. '
            "Choose a checkpoint of that family."
        )
    for field, plain in PLAIN.items():
        if found.get(field, plain) != plain:
            raise ValueError(
                f"{path} says {field} = {found[field]!r}, but only {plain!r} is supported. "
                "Choose a checkpoint without it."
            )
    rope_type = (found.get("rope_parameters") or {}).get("rope_type", "default")
    if rope_type != "default":
        raise ValueError(
            f'{path} says rope_type {rope_type!r}, but only "default" is supported. '
            "Choose a checkpoint without it."
        )


def _read_weights(path: Path, config: LlamaConfig, dtype: DTypeLike) -> Params:
    safetensors = _safetensors()
    try:
        with safetensors.safe_open(path, framework="np") as file:
            found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            for name, shape in param_shapes(config).items():
                _check_weight(name, shape, found, str(path))
            return {name: jnp.asarray(file.get_tensor(name), dtype) for name in param_shapes(config)}
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is cut short or damaged ({error}). Copy the file again.") from error


def _check_weight(
    name: str, shape: tuple[int, ...], found: Mapping[str, tuple[int, ...]], where: str
) -> None:
    if name not in found:
        raise ValueError(f"{where} has no tensor {name!r}, which the configuration calls for.")
    if found[name] != shape:
        raise ValueError(
            f"{where} has {name!r} of shape {found[name]}, but the configuration calls for {shape}. "
            "Use the configuration and the weights of one checkpoint."
        )


def _existing_file(directory: Path, name: str) -> Path:
    path = directory / name
    if path.is_file():
        return path
    if (directory / f"{name}.index.json").is_file():
        raise ValueError(
            f"{directory} holds a checkpoint in several files, but only a single {name} can be loaded. "
            "Merge the files first."
        )
    raise FileNotFoundError(f"There is no {path}. Give a directory with {CONFIG_FILE} and {WEIGHTS_FILE}.")


def _safetensors() -> ModuleType:
    try:
        import safetensors
        import safetensors.numpy
    except ImportError as error:
        raise ImportError('Checkpoints need safetensors: pip install "qpaged[sweep]"') from error
    return safetensors
