"""The tensors of a checkpoint, in one `model.safetensors` or in several shards with an index."""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from qpaged._extras import need
from qpaged._files import read_json

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
DTYPES = {"BF16": jnp.dtype("bfloat16"), "F16": jnp.dtype("float16"), "F32": jnp.dtype("float32")}
"""The dtypes that a decoder's weights may have, by safetensors' name."""
PIECE = 2**24


@dataclass(frozen=True)
class StoredTensor:
    """One tensor in a file, not yet read.

    Attributes:
        path: the file.
        name: its name in the file.
        shape: its shape.
        dtype: its dtype, by safetensors' name.
        offset: the byte of the file at which its values start.
    """

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: str
    offset: int

    def read(self, dtype: DTypeLike | None) -> jax.Array:
        """Return its values, cast to ``dtype``, or as they are stored if None."""
        size = math.prod(self.shape)
        values = np.fromfile(self.path, DTYPES[self.dtype], size, offset=self.offset)
        array = jax.device_put(values.reshape(self.shape))
        if dtype is not None:
            array = array.astype(dtype)
        # Once the array is ready, the stored values can be freed, before the next tensor is read.
        return array.block_until_ready()

    def has_values_of(self, other: "StoredTensor") -> bool:
        """Return True if another tensor has the same values, read and compared a piece at a time."""
        if (self.shape, self.dtype) != (other.shape, other.dtype):
            return False
        ours = np.memmap(self.path, np.uint8, "r", self.offset, self.nbytes)
        others = np.memmap(other.path, np.uint8, "r", other.offset, other.nbytes)
        pieces = [slice(start, start + PIECE) for start in range(0, self.nbytes, PIECE)]
        return all(np.array_equal(ours[piece], others[piece]) for piece in pieces)

    @property
    def nbytes(self) -> int:
        """Bytes of its values."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


def weight_files(directory: Path) -> list[Path]:
    """Return the files of a checkpoint's weights, sorted; an empty list if there are none.

    Raises:
        FileNotFoundError: a shard is missing.
        ValueError: the index is malformed.
    """
    if (directory / WEIGHTS_FILE).is_file():
        return [directory / WEIGHTS_FILE]
    if not (directory / INDEX_FILE).is_file():
        return []
    shards = sorted(set(_read_weight_map(directory).values()))
    missing = [shard for shard in shards if not (directory / shard).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{directory} lacks {', '.join(missing)}, which {INDEX_FILE} names. Copy the missing shards."
        )
    return [directory / shard for shard in shards]


def stored_tensors(directory: Path) -> dict[str, StoredTensor]:
    """Return every tensor of a checkpoint by name, from the headers of its files alone.

    Raises:
        FileNotFoundError: a shard is missing.
        ValueError: a damaged file, or an index that does not fit the shards.
    """
    tensors: dict[str, StoredTensor] = {}
    for path in weight_files(directory):
        for tensor in file_tensors(path):
            tensors[tensor.name] = tensor
    is_sharded = bool(tensors) and not (directory / WEIGHTS_FILE).is_file()
    if is_sharded:
        _check_index(directory, tensors)
    return tensors


def file_tensors(path: Path) -> list[StoredTensor]:
    """Return the tensors of a file: the length of the header in 8 bytes, the header as JSON, and then values.

    The safetensors library checks the file, but would copy the values twice if it read them.
    """
    _check_complete(path)
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(header_bytes))
    header.pop("__metadata__", None)
    values_start = 8 + header_bytes
    tensors = []
    for name, entry in header.items():
        offset = values_start + entry["data_offsets"][0]
        tensors.append(StoredTensor(path, name, tuple(entry["shape"]), entry["dtype"], offset))
    return tensors


def _check_complete(path: Path) -> None:
    """Raise ValueError if a file is truncated or damaged: opening it checks header and length."""
    safetensors = need("safetensors")
    try:
        with safetensors.safe_open(path, framework="np"):
            pass
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is cut short or damaged ({error}). Copy the file again.") from error


def _check_index(directory: Path, tensors: dict[str, StoredTensor]) -> None:
    """Raise ValueError unless each tensor of the index is in the shard that the index names."""
    for name, shard in _read_weight_map(directory).items():
        if name not in tensors or tensors[name].path.name != shard:
            raise ValueError(
                f"{directory / INDEX_FILE} says that {shard} has the tensor {name!r}, but it has not. "
                "Copy the index and the shards of one checkpoint."
            )


def _read_weight_map(directory: Path) -> dict[str, str]:
    """Return the shard of each tensor, as the index says."""
    path = directory / INDEX_FILE
    index = read_json(path)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise _no_weight_map(path)
    if not all(isinstance(shard, str) for shard in weight_map.values()):
        raise _no_weight_map(path)
    elsewhere = [shard for shard in weight_map.values() if Path(shard).name != shard]
    if elsewhere:
        raise ValueError(
            f"{path} must name files beside it, but names {elsewhere[0]!r}. Choose a checkpoint whose shards "
            f"lie in its own directory."
        )
    return weight_map


def _no_weight_map(path: Path) -> ValueError:
    return ValueError(f"{path} has no weight_map of tensors to shards. Copy the file again.")
