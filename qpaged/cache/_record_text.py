"""The text form of a record: arrays as base64, each with its name, and a digest of the whole."""

import base64
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qpaged._files import DIGEST, has_own_digest


def to_text_form(value: Any, name: str = "") -> Any:
    """Return a record with its arrays as dictionaries, named by the path that leads to them."""
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):  # JSON would make it one, and the digest another
                raise TypeError(
                    f"keys of a record must be strings, but {key!r} came in {name}; give the format a config "
                    f"of plain JSON."
                )
        return {key: to_text_form(part, f"{name}/{key}") for key, part in value.items()}
    if isinstance(value, list):
        return [to_text_form(part, f"{name}/{index}") for index, part in enumerate(value)]
    if isinstance(value, np.generic | np.ndarray | jax.Array):
        return _array_to_text_form(np.asarray(value), name)
    return value


def check_digest(record: Mapping[str, Any]) -> None:
    """Raise ValueError unless the record is as it was written."""
    if not has_own_digest(record):
        raise ValueError(
            f"data was changed or damaged since it was written: its digest "
            f"{'does not match' if DIGEST in record else 'is missing'}; write it again with to_json."
        )


def _array_to_text_form(array: np.ndarray, name: str) -> dict[str, Any]:
    array = array.astype(array.dtype.newbyteorder("="))  # the dtype's name does not tell the byte order
    data = base64.b64encode(array.tobytes()).decode("ascii")
    return {
        "type": "array",
        "name": name,
        "dtype": array.dtype.name,
        "shape": list(array.shape),
        "data": data,
    }


def array_of_text_form(data: Mapping[str, Any], name: str | None) -> jax.Array | np.ndarray:
    """Return the array of a dictionary; a NumPy one where JAX would narrow it, as it does 64-bit integers.

    Args:
        data: as :func:`to_text_form` writes an array.
        name: the path that led to it; None in records of the first version, which has no names.

    Raises:
        ValueError: the array is not whole, or belongs elsewhere.
    """
    if name is not None and data.get("name") != name:
        raise ValueError(
            f"data must hold the array {name!r} in its place, but holds {data.get('name')!r}; parts of it "
            f"were exchanged."
        )
    try:
        array = _decoded(data)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"data holds an array that is not whole: {error}") from error
    if jax.dtypes.canonicalize_dtype(array.dtype) != array.dtype:
        return array
    return jnp.asarray(array)


def _decoded(data: Mapping[str, Any]) -> np.ndarray:
    dtype, shape = jnp.dtype(data["dtype"]), data["shape"]
    if dtype.name != data["dtype"] or dtype.kind not in "biufV":  # ml_dtypes' floats are of the kind V
        raise ValueError(f"no array has the dtype {data['dtype']!r}")
    if not isinstance(shape, list) or any(type(length) is not int or length < 0 for length in shape):
        raise ValueError(f"no array has the shape {shape!r}")
    flat = np.frombuffer(base64.b64decode(data["data"], validate=True), dtype)
    return flat.reshape(shape)
