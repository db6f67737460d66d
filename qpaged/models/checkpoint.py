"""Read and write decoders as Hugging Face stores them: `config.json` beside safetensors."""

import hashlib
import json
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike

from qpaged._extras import need
from qpaged._files import read_json, write_whole
from qpaged.models._placed import read_placed, sharding_of
from qpaged.models._safetensors import (
    DTYPES,
    INDEX_FILE,
    WEIGHTS_FILE,
    StoredTensor,
    stored_tensors,
    weight_files,
)
from qpaged.models.config import DecoderConfig
from qpaged.models.decoder import EMBEDDING, EXPERTS, OUTPUT, Params, Shapes, param_shapes
from qpaged.models.families import FAMILIES, decoder_config, llama_fields
from qpaged.models.scales import is_cache_scale

CONFIG_FILE = "config.json"

MODEL_PREFIX = "model."
OUTPUT_PREFIX = "lm_head."
LAYOUTS = (
    (MODEL_PREFIX, OUTPUT_PREFIX),
    ("language_model.model.", "language_model.lm_head."),
    ("model.language_model.", OUTPUT_PREFIX),
    ("", OUTPUT_PREFIX),
)
"""Prefixes of the names of a decoder's weights and of its output matrix: alone, beside a vision tower, and
saved without an output matrix."""

BUFFERS = ("rotary_emb.inv_freq",)
"""Tensors of a layer that older checkpoints store though they follow from the configuration."""


def read_config(path: str | Path) -> DecoderConfig:
    """Read the configuration of a checkpoint, from its directory or its `config.json`; no weights are needed.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a family or feature that is not implemented, or a malformed file.
    """
    path = find_config(path)
    fields = read_json(path)
    try:
        return decoder_config(fields)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def load_checkpoint(
    directory: str | Path,
    dtype: DTypeLike | None = None,
    mesh: Mesh | None = None,
    *,
    streamed: bool = False,
) -> tuple[DecoderConfig, Params]:
    """Read the configuration and weights of a checkpoint of one file or of shards, weights cast to `dtype`.

    Weights keep their stored dtypes if None. They are read one by one: no more than the model and the weight
    being read is in memory, and tensors that the decoder does not use are not read. If the checkpoint has no
    output matrix, the embedding is used for it.

    Args:
        directory: of the checkpoint.
        dtype: of the weights.
        mesh: the devices to divide matrices over, each of which reads its own part; None for one device.
        streamed: read a weight whenever it is used, and keep none: the whole model need not fit into memory.

    Raises:
        FileNotFoundError: a missing file.
        ValueError: a family or feature that is not implemented, a missing or misshapen tensor, a damaged
            file.
        ImportError: safetensors is missing.
    """
    path = find_config(directory)
    config, tensors = _used_tensors(path, compare_tied=True)
    if tensors is None:
        raise _no_weights(path.parent)
    stored = StoredParams(config, tensors, dtype, mesh)
    return config, stored if streamed else dict(stored)


@dataclass(frozen=True)
class StoredParams(Mapping[str, jax.Array]):
    """The weights of a checkpoint, each of which is read whenever it is asked for.

    Attributes:
        config: of the decoder.
        tensors: those that it uses.
        dtype: to which weights are cast.
        mesh: the devices that they are divided over.
    """

    config: DecoderConfig
    tensors: Mapping[str, StoredTensor]
    dtype: DTypeLike | None
    mesh: Mesh | None

    def __getitem__(self, name: str) -> jax.Array:
        shape = self._shapes[name]
        parts = [self.tensors[part] for part in _part_shapes(self.config, name, shape)]
        if self.mesh is not None:
            return read_placed(parts, shape, self.dtype, sharding_of(name, shape, self.mesh))
        if EXPERTS not in name:
            return parts[0].read(self.dtype)
        # Once the stack is ready, its parts can be freed, before the next weight is read.
        return jnp.stack([part.read(self.dtype) for part in parts]).block_until_ready()

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)

    @cached_property
    def _shapes(self) -> Shapes:
        return param_shapes(self.config)


def parameter_bytes(path: str | Path) -> int | None:
    """Return the bytes of the weights that `load_checkpoint` reads; None if the checkpoint has no weights.

    Only the headers of the files are read. `path` is as in `read_config`. Raises as `load_checkpoint`.
    """
    _, tensors = _used_tensors(find_config(path))
    if tensors is None:
        return None
    return sum(prod(tensor.shape) * DTYPES[tensor.dtype].itemsize for tensor in tensors.values())


def checkpoint_sha256(directory: str | Path) -> str:
    """Return the SHA-256 of a checkpoint: of what `sha256sum` prints for `config.json` and the weight files.

    Raises:
        FileNotFoundError: a missing file.
        ValueError: a malformed index.
    """
    directory = Path(directory)
    config_path = find_config(directory)
    weight_paths = weight_files(directory)
    if not weight_paths:
        raise _no_weights(directory)
    digest = hashlib.sha256()
    for path in (config_path, *weight_paths):
        with path.open("rb") as file:
            file_sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        digest.update(f"{file_sha256}  {path.name}\n".encode())
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
    dtype = jnp.dtype(dtype)
    fields = llama_fields(config) | {"torch_dtype": dtype.name}
    given_shapes = {name: weight.shape for name, weight in params.items()}
    weights: dict[str, np.ndarray] = {}
    for name, shape in param_shapes(config).items():
        _check_weight(name, shape, given_shapes, "params")
        weights[name] = np.asarray(params[name]).astype(dtype)
    # Transformers refuses a file that does not say which framework's layout it follows.
    data = need("safetensors.numpy").save(weights, metadata={"format": "pt"})
    directory.mkdir(parents=True, exist_ok=True)
    write_whole(directory / WEIGHTS_FILE, data)
    write_whole(directory / CONFIG_FILE, (json.dumps(fields, indent=2) + "\n").encode())


def find_config(path: str | Path) -> Path:
    """Return the path of a checkpoint's configuration, given the directory or the file itself."""
    given = path = Path(path)
    if path.is_dir() or path.suffix != ".json":
        path = path / CONFIG_FILE
    if not path.is_file():
        hint = ""
        if len(given.parts) == 2 and not given.exists():  # as meta-llama/Llama-3.1-8B
            hint = f" A model of the Hugging Face Hub is downloaded by: hf download {given} --local-dir DIR"
        raise FileNotFoundError(
            f"There is no {path}. Give the directory of a checkpoint, with its {CONFIG_FILE}.{hint}"
        )
    return path


def _no_weights(directory: Path) -> Exception:
    """Return the error for a directory without safetensors."""
    pickled = sorted(directory.glob("pytorch_model*.bin"))
    if pickled:
        return ValueError(
            f"{directory} has its weights in {pickled[0].name}, but only safetensors can be loaded. "
            "Convert them: load the model with transformers and save it with save_pretrained."
        )
    others = sorted(path.name for path in directory.glob("*.safetensors"))
    if others:
        return FileNotFoundError(
            f"{directory} has {others[0]}, but neither {WEIGHTS_FILE} nor {INDEX_FILE}, which says where "
            f"each weight is. Copy the index too, or save the model again with save_pretrained."
        )
    return FileNotFoundError(
        f"There is no {directory / WEIGHTS_FILE}, and no {INDEX_FILE}. Give a directory with weights."
    )


def _used_tensors(
    config_path: Path, compare_tied: bool = False
) -> tuple[DecoderConfig, dict[str, StoredTensor] | None]:
    """Return a configuration, and the tensors that its decoder uses, by their names in `_stored_shapes`.

    The tensors are None if there are no weights. Only ``compare_tied`` reads values: it unties an output
    matrix that is stored beside the embedding and differs from it.
    """
    directory = config_path.parent
    config = read_config(config_path)
    stored = _with_plain_names(stored_tensors(directory))
    if not stored:
        return config, None
    if config.tie_word_embeddings and OUTPUT in stored:
        stored.setdefault(EMBEDDING, stored[OUTPUT])
        if compare_tied and not stored[OUTPUT].has_values_of(stored[EMBEDDING]):
            warnings.warn(
                f"{config_path} says tie_word_embeddings, but the stored {OUTPUT} is not the embedding; the "
                f"stored one is used.",
                stacklevel=3,
            )
            config = replace(config, tie_word_embeddings=False)
    shapes = _stored_shapes(config)
    stored_shapes = {name: tensor.shape for name, tensor in stored.items()}
    for name, shape in shapes.items():
        _check_weight(name, shape, stored_shapes, str(directory))
    _check_all_used(config, stored)
    return config, {name: stored[name] for name in shapes}


def _stored_shapes(config: DecoderConfig) -> Shapes:
    """Return the shape of every tensor that a decoder's weights are stored in, by name."""
    shapes: Shapes = {}
    for name, shape in param_shapes(config).items():
        shapes |= _part_shapes(config, name, shape)
    return shapes


def _part_shapes(config: DecoderConfig, name: str, shape: tuple[int, ...]) -> Shapes:
    """Return the shapes of the tensors that one weight is stored in: itself, or each expert's own."""
    names = [name]
    if EXPERTS in name:
        names = [name.replace(EXPERTS, f"{EXPERTS}{expert}.") for expert in range(shape[0])]
        shape = shape[1:]
    for ours, stored in FAMILIES[config.model_type].stored_names.items():
        names = [part.replace(ours, stored) for part in names]
    return dict.fromkeys(names, shape)


def _with_plain_names(stored: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Return a decoder's tensors by the names that they have in a checkpoint of text alone."""
    model_prefix, output_prefix = _find_layout(stored)
    plain: dict[str, StoredTensor] = {}
    for name, tensor in stored.items():
        if name.startswith(output_prefix):
            plain[OUTPUT_PREFIX + name.removeprefix(output_prefix)] = tensor
        elif name.startswith(model_prefix):
            plain[MODEL_PREFIX + name.removeprefix(model_prefix)] = tensor
    return plain


def _find_layout(stored: Mapping[str, StoredTensor]) -> tuple[str, str]:
    """Return the prefixes that a checkpoint uses: those with which it has a final norm."""
    for model_prefix, output_prefix in LAYOUTS:
        if f"{model_prefix}norm.weight" in stored:
            return model_prefix, output_prefix
    return LAYOUTS[0]


def _check_weight(
    name: str, shape: tuple[int, ...], given_shapes: Mapping[str, tuple[int, ...]], source: str
) -> None:
    """Raise ValueError unless a weight is given in the shape that the configuration calls for."""
    if name not in given_shapes:
        raise ValueError(
            f"{source} has no tensor {name!r}, which the configuration calls for. "
            "Copy all files of the checkpoint again."
        )
    if given_shapes[name] != shape:
        raise ValueError(
            f"{source} has {name!r} of shape {given_shapes[name]}, but the configuration calls for {shape}. "
            "Use the configuration and the weights of one checkpoint."
        )


def _check_all_used(config: DecoderConfig, stored: Mapping[str, StoredTensor]) -> None:
    """Raise ValueError if a tensor of the decoder would be left out: a bias or a norm changes the results."""
    shapes = _stored_shapes(config)
    for name, tensor in stored.items():
        # A tied output matrix may be stored beside the embedding; it is the same matrix.
        is_known = name in shapes or name == OUTPUT or name.endswith(BUFFERS) or is_cache_scale(name)
        if not is_known:
            raise ValueError(
                f"{tensor.path} has the tensor {tensor.name!r}, which {CONFIG_FILE} "
                f"({config.num_hidden_layers} layers of a {config.model_type}) does not call for. Use the "
                f"{CONFIG_FILE} that came with these weights."
            )
        if name in shapes and tensor.dtype not in DTYPES:
            raise ValueError(
                f"{tensor.path} stores {tensor.name!r} as {tensor.dtype}, but only "
                f"{', '.join(DTYPES)} can be loaded. Choose a checkpoint with such weights."
            )
