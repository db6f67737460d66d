"""Records: the dictionary and JSON forms of the cache's classes."""

import base64
import dataclasses
import json
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np

from qpaged.arrays import QuantizedArray, check_parts, fill_rows, float_dtype
from qpaged.quantizer import CacheFormat, quantizer_from_config

VERSION = 1
PARTS = ("codes", "scales", "outer")


class Record:
    """A frozen dataclass that becomes a dictionary or JSON and back, bit for bit."""

    _records: ClassVar[dict[str, type["Record"]]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        Record._records[cls.__name__] = cls

    def replace(self, **changes: Any) -> Self:
        """A copy with these fields replaced."""
        return dataclasses.replace(self, **changes)  # type: ignore[type-var]

    def to_dict(self) -> dict[str, Any]:
        """Nested dictionaries and lists; arrays stay arrays."""
        fields = {field.name: _pack(getattr(self, field.name)) for field in dataclasses.fields(self)}  # type: ignore[arg-type]
        return {"type": type(self).__name__, "version": VERSION, **fields}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """The object that :meth:`to_dict` describes.

        Raises:
            ValueError: another type or version, a missing or an unknown field.
        """
        name, version = (data.get("type"), data.get("version")) if isinstance(data, Mapping) else (None, None)
        if name != cls.__name__ or version != VERSION:
            raise ValueError(
                f"data must hold a {cls.__name__} of version {VERSION}, but holds type {name!r}, version "
                f"{version!r}; read it with the class and the qpaged that wrote it."
            )
        given = {key: value for key, value in data.items() if key not in ("type", "version")}
        known = {field.name for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
        if given.keys() != known:
            raise ValueError(
                f"data of a {cls.__name__} must hold exactly the fields {sorted(known)}, "
                f"but {sorted(known ^ given.keys())} are missing or unknown."
            )
        record = cls(**{key: _unpack(value) for key, value in given.items()})
        record.check_record()
        return record

    def check_record(self) -> None:
        """ValueError where fields that were read do not fit each other."""

    def to_json(self, **kwargs: Any) -> str:
        """JSON text; arrays as base64. ``kwargs`` go to ``json.dumps``."""
        return json.dumps(self.to_dict(), default=_array_to_json, **kwargs)

    @classmethod
    def from_json(cls, json_str: str) -> Self:
        """The object that :meth:`to_json` wrote.

        Raises:
            ValueError: not JSON, or not of this class; see :meth:`from_dict`.
        """
        return cls.from_dict(json.loads(json_str))


def _pack(value: Any) -> Any:
    if isinstance(value, Record):
        return value.to_dict()
    if isinstance(value, CacheFormat):
        return {"type": "CacheFormat", **value.config}
    if isinstance(value, QuantizedArray):
        config = value.quantizer.config
        parts = {name: getattr(value, name) for name in PARTS}
        return {"type": "QuantizedArray", "quantizer": config, "dtype": jnp.dtype(value.dtype).name, **parts}
    if isinstance(value, list | tuple):
        return [_pack(item) for item in value]
    if value is None or isinstance(value, bool | int | float | str | np.generic | np.ndarray | jax.Array):
        return value
    raise TypeError(
        f"only plain and QuantizedArray pages and named formats can be written to a record, but a "
        f"{type(value).__name__} came; use a registered quantizer instead."
    )


def _unpack(value: Any) -> Any:
    if isinstance(value, list):
        return [_unpack(item) for item in value]
    if not isinstance(value, Mapping):
        return value
    kind = str(value.get("type"))
    if kind in Record._records:
        return Record._records[kind].from_dict(value)
    unpack = {
        "CacheFormat": CacheFormat.from_config,
        "array": _array_from_json,
        "QuantizedArray": _quantized,
    }.get(kind)
    if unpack is None:
        raise ValueError(
            f"data holds a part of unknown type {kind!r}; it was not written by this version of qpaged."
        )
    return unpack(value)


def _quantized(data: Mapping[str, Any]) -> QuantizedArray:
    try:
        quantizer = quantizer_from_config(data["quantizer"])
        dtype = float_dtype("dtype", data["dtype"])
        codes, scales = _unpack(data["codes"]), _unpack(data["scales"])
        outer = _unpack(data.get("outer"))  # which the first files do not have
        check_parts(codes, scales, outer, quantizer, dtype)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"data holds pages that are not whole: {error!r}") from error
    return fill_rows(QuantizedArray(codes, scales, None, outer, quantizer, dtype=dtype))


def _array_to_json(array: Any) -> dict[str, Any]:
    array = np.asarray(array)
    array = array.astype(array.dtype.newbyteorder("="))  # the dtype's name does not tell the order
    data = base64.b64encode(array.tobytes()).decode("ascii")
    return {"type": "array", "dtype": array.dtype.name, "shape": list(array.shape), "data": data}


def _array_from_json(data: Mapping[str, Any]) -> jax.Array | np.ndarray:
    """A JAX array; a NumPy one of what JAX would narrow."""
    try:
        flat = np.frombuffer(base64.b64decode(data["data"], validate=True), jnp.dtype(data["dtype"]))
        array = flat.reshape(data["shape"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"data holds an array that is not whole: {error}") from error
    return jnp.asarray(array) if jax.dtypes.canonicalize_dtype(array.dtype) == array.dtype else array
