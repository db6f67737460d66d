"""The tensors of a checkpoint, in one `model.safetensors` or in several shards with an index."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from qpaged.models._extras import need

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
ITEM_BYTES = {"BF16": 2, "F16": 2, "F32": 4}
"""Bytes of an element, by safetensors' name of the dtypes that a decoder's weights may have."""


@dataclass(frozen=True)
class StoredTensor:
    """One tensor, not yet read: its file, its name there, its shape and safetensors' name of its dtype."""

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: str

    def read(self, dtype: DTypeLike | None) -> jax.Array:
        """Its values, as they are stored or cast to ``dtype``."""
        # A file keeps what was read of it mapped until it is closed: opened anew, the last tensor at most.
        with open_shard(self.path) as file:
            return jnp.asarray(file.get_tensor(self.name), dtype)


def weight_files(directory: Path) -> list[Path]:
    """The files of a checkpoint's weights, sorted; none where there are none.

    Raises:
        FileNotFoundError: a shard is missing.
        ValueError: the index is malformed.
    """
    if (directory / WEIGHTS_FILE).is_file():
        return [directory / WEIGHTS_FILE]
    if not (directory / INDEX_FILE).is_file():
        return []
    names = sorted(set(_weight_map(directory).values()))
    missing = [name for name in names if not (directory / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{directory} lacks {', '.join(missing)}, which {INDEX_FILE} names. Copy the missing shards."
        )
    return [directory / name for name in names]


def stored_tensors(directory: Path) -> dict[str, StoredTensor]:
    """Every tensor of a checkpoint by name, from the headers of its files alone.

    Raises:
        FileNotFoundError: a shard is missing.
        ValueError: a damaged file, or an index that does not fit the shards.
    """
    found = {tensor.name: tensor for path in weight_files(directory) for tensor in _header(path)}
    if (directory / WEIGHTS_FILE).is_file() or not found:
        return found
    for name, shard in _weight_map(directory).items():
        if name not in found or found[name].path.name != shard:
            raise ValueError(
                f"{directory / INDEX_FILE} says that {shard} has the tensor {name!r}, but it has not. "
                "Copy the index and the shards of one checkpoint."
            )
    return found


def _header(path: Path) -> list[StoredTensor]:
    with open_shard(path) as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        return [StoredTensor(path, n, tuple(s.get_shape()), s.get_dtype()) for n, s in slices.items()]


def open_shard(path: Path) -> Any:
    """A safetensors file, open for reading NumPy arrays."""
    safetensors = need("safetensors")
    try:
        return safetensors.safe_open(path, framework="np")
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is cut short or damaged ({error}). Copy the file again.") from error


def _weight_map(directory: Path) -> dict[str, str]:
    """Each tensor's shard."""
    path = directory / INDEX_FILE
    found = read_json(path)
    shards = found.get("weight_map") if isinstance(found, dict) else None
    if not isinstance(shards, dict) or not shards or not all(isinstance(s, str) for s in shards.values()):
        raise ValueError(f"{path} has no weight_map of tensors to shards. Copy the file again.")
    return shards


def read_json(path: Path) -> Any:
    """What a JSON file holds.

    Raises:
        ValueError: it is not JSON.
    """
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}). Copy the file again.") from error
