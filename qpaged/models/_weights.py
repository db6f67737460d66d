"""The bytes of a checkpoint's weights, of whatever kind, or computed without any."""

import re
from math import prod
from pathlib import Path

import jax.numpy as jnp

from qpaged._files import read_json
from qpaged.models._json_fields import Json, read_object
from qpaged.models._safetensors import weight_files
from qpaged.models.checkpoint import find_config
from qpaged.models.decoder import param_shapes
from qpaged.models.families import decoder_config

PATTERNS = (
    "model-*-of-*.safetensors",
    "consolidated.safetensors",
    "consolidated-*-of-*.safetensors",
    "pytorch_model.bin",
    "pytorch_model-*-of-*.bin",
    "consolidated.*.pth",
)
"""Files that hold all weights, beside those that can be loaded; a directory may have several such sets."""
FP8 = "fp8"  # what transformers calls weights of float8_e4m3fn with scales for blocks, which are few
LFS_POINTER = b"version https://git-lfs"
DTYPE_NAMES = "dtype", "torch_dtype"


def weights_bytes(path: str | Path) -> tuple[int, str]:
    """Return the bytes of a checkpoint's weights, and where the number comes from.

    It is the size of the files, of whatever kind. A configuration without weights has them computed.

    Raises:
        FileNotFoundError: there is no such checkpoint, or a file of its weights is missing.
        ValueError: a file holds no weights, or there are none and the weights of such a model cannot be
            computed.
    """
    path = find_config(path)
    files = _weight_files(path.parent)
    if files:
        names = files[0].name if len(files) == 1 else f"{len(files)} files like {files[0].name}"
        return sum(_file_bytes(file) for file in files), f"the size of {names}"
    try:
        count, stored_as = _computed_bytes(read_json(path))
        return count, f"computed from {path.name}, as {stored_as}"
    except (TypeError, ValueError) as error:
        reason = str(error).partition(". ")[0].rstrip(".")  # without its advice to choose another file
        raise ValueError(
            f"{path.parent} has no weights, and their bytes cannot be computed ({reason}). Give the bytes, "
            f"as in --weights 16GB."
        ) from error


def _computed_bytes(fields: Json) -> tuple[int, str]:
    """Return the bytes of the weights that a configuration describes, and the names of their dtypes.

    Raises:
        TypeError, ValueError: no such model can be read, or its dtype is none of numbers.
    """
    itemsize, stored_as = _stored_dtype(fields)
    method = read_object(fields, "quantization_config").get("quant_method")
    if method != FP8:
        return itemsize * sum(map(prod, param_shapes(decoder_config(fields)).values())), stored_as
    shapes = param_shapes(decoder_config({**fields, "quantization_config": None}))
    # The matrices of layers take a byte an element; embeddings and vectors stay as they were.
    count = 0
    for name, shape in shapes.items():
        is_fp8 = "layers." in name and len(shape) > 1
        count += prod(shape) * (1 if is_fp8 else itemsize)
    return count, f"{FP8}, and {stored_as} outside of layers"


def _weight_files(directory: Path) -> list[Path]:
    """Return the files of one set of a checkpoint's weights: those that would be loaded, or of another kind.

    Raises:
        FileNotFoundError: a file is missing.
    """
    files = weight_files(directory)
    for pattern in PATTERNS:
        if not files:
            files = sorted(file for file in directory.glob(pattern) if file.is_file())
            _check_whole(files)
    return files


def _check_whole(files: list[Path]) -> None:
    """Raise FileNotFoundError unless files are as many as their names say, as 00001-of-00002."""
    said = {int(count) for file in files for count in re.findall(r"-of-(\d+)\.", file.name)}
    if said - {len(files)}:
        raise FileNotFoundError(
            f"{files[0].parent} must have as many files like {files[0].name} as their names say, but has "
            f"{len(files)}. Copy all files of one checkpoint."
        )


def _file_bytes(file: Path) -> int:
    """Return the size of a file, which must hold weights."""
    with file.open("rb") as opened:
        start = opened.read(len(LFS_POINTER))
    if start in (b"", LFS_POINTER):
        raise ValueError(
            f"{file} holds {'a pointer of Git LFS' if start else 'nothing'} where weights should be. Fetch "
            f"it with git lfs pull, or give their size, as in --weights 16GB."
        )
    return file.stat().st_size


def _stored_dtype(fields: Json) -> tuple[int, str]:
    """Return the bytes of a weight and the name of its dtype, which may stand in the `text_config` alone."""
    places = (fields, read_object(fields, "text_config"))
    stated = [place[name] for place in places for name in DTYPE_NAMES if place.get(name)]
    name = str(stated[0]).removeprefix("torch.") if stated else "bfloat16"
    dtype = jnp.dtype(name)
    if not jnp.issubdtype(dtype, jnp.number):
        raise TypeError(f"its dtype {name!r} is none of numbers.")
    return dtype.itemsize, name
