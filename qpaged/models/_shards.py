"""The tensors of a checkpoint, in one `model.safetensors` or in several shards with an index."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from qpaged.models._extras import need

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
DTYPES = {"BF16": jnp.dtype("bfloat16"), "F16": jnp.dtype("float16"), "F32": jnp.dtype("float32")}
"""The dtypes that a decoder's weights may have, by safetensors' name."""


@dataclass(frozen=True)
class StoredTensor:
    """One tensor, not yet read.

    Attributes:
        path: its file.
        name: in that file.
        dtype: safetensors' name of it.
        offset: the byte of the file at which it starts.
    """

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: str
    offset: int

    def read(self, dtype: DTypeLike | None) -> jax.Array:
        """Its values, as they are stored or cast to ``dtype``."""
        values = np.fromfile(self.path, DTYPES[self.dtype], math.prod(self.shape), offset=self.offset)
        array = jax.device_put(values.reshape(self.shape))
        # Ready means that what was read is free before the next tensor comes.
        return (array if dtype is None else array.astype(dtype)).block_until_ready()


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
    """The tensors of a file.

    Its length in 8 bytes, JSON, and then the values: the library checks these, and would copy them twice.
    """
    _check_whole(path)
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        found = json.loads(file.read(length))
    found.pop("__metadata__", None)
    return [
        StoredTensor(path, name, tuple(each["shape"]), each["dtype"], 8 + length + each["data_offsets"][0])
        for name, each in found.items()
    ]


def _check_whole(path: Path) -> None:
    safetensors = need("safetensors")
    try:
        with safetensors.safe_open(path, framework="np"):
            pass
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
