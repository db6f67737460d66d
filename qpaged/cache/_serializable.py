"""The dictionary and JSON forms of the cache's classes."""

import base64
import dataclasses
import json
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np

from qpaged import pools
from qpaged.formats import CacheFormat
from qpaged.implicit import ImplicitArray

VERSION = 1
ARRAYS_OF_PAGES = ("codes", "scales", "outer")  # in the record of a quantized pool


class Serializable:
    """A frozen dataclass that becomes a dictionary or JSON and back, bit for bit."""

    _classes: ClassVar[dict[str, type["Serializable"]]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        Serializable._classes[cls.__name__] = cls

    def replace(self, **changes: Any) -> Self:
        """Return a copy with these fields replaced."""
        return dataclasses.replace(self, **changes)  # type: ignore[type-var]

    def to_dict(self) -> dict[str, Any]:
        """Return nested dictionaries and lists; arrays stay arrays."""
        data: dict[str, Any] = {"type": type(self).__name__, "version": VERSION}
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            data[field.name] = _pack(getattr(self, field.name))
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Return the object that :meth:`to_dict` describes.

        Raises:
            ValueError: another type or version, a missing or an unknown field.
        """
        type_name = version = None
        if isinstance(data, Mapping):
            type_name, version = data.get("type"), data.get("version")
        if type_name != cls.__name__ or version != VERSION:
            raise ValueError(
                f"data must hold a {cls.__name__} of version {VERSION}, but holds type {type_name!r}, "
                f"version {version!r}; read it with the class and the qpaged that wrote it."
            )
        given = {name: value for name, value in data.items() if name not in ("type", "version")}
        known = {field.name for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
        if given.keys() != known:
            raise ValueError(
                f"data of a {cls.__name__} must hold exactly the fields {sorted(known)}, "
                f"but {sorted(known ^ given.keys())} are missing or unknown."
            )
        made = cls(**{name: _unpack(value) for name, value in given.items()})
        made.check_fields()
        return made

    def check_fields(self) -> None:
        """Raise ValueError where fields that were read do not fit each other."""

    def to_json(self, **kwargs: Any) -> str:
        """Return JSON text; arrays as base64. ``kwargs`` go to ``json.dumps``."""
        return json.dumps(self.to_dict(), default=_array_to_json, **kwargs)

    @classmethod
    def from_json(cls, json_str: str) -> Self:
        """Return the object that :meth:`to_json` wrote.

        Raises:
            ValueError: not JSON, or not of this class; see :meth:`from_dict`.
        """
        return cls.from_dict(json.loads(json_str))


def _pack(value: Any) -> Any:
    """Return a field's value as plain values, lists, dictionaries and arrays."""
    if isinstance(value, Serializable):
        return value.to_dict()
    if isinstance(value, CacheFormat):
        return {"type": "CacheFormat", **value.config}
    if isinstance(value, ImplicitArray | pools.Pool):
        return pools.to_record(value)
    if isinstance(value, list | tuple):
        return [_pack(item) for item in value]
    if value is None or isinstance(value, bool | int | float | str | np.generic | np.ndarray | jax.Array):
        return value
    raise pools.no_record_of(value)


def _unpack(value: Any) -> Any:
    """Return what :func:`_pack` was given; ValueError says what is wrong with what it never returns."""
    if isinstance(value, list):
        return [_unpack(item) for item in value]
    if not isinstance(value, Mapping):
        return value
    type_name = str(value.get("type"))
    if type_name in Serializable._classes:
        return Serializable._classes[type_name].from_dict(value)
    if type_name == "CacheFormat":
        return CacheFormat.from_config(value)
    if type_name == "array":
        return _array_from_json(value)
    if type_name == "QuantizedArray":
        return _unpack_pages(value)
    raise ValueError(
        f"data holds a part of unknown type {type_name!r}; it was not written by this version of qpaged."
    )


def _unpack_pages(data: Mapping[str, Any]) -> pools.Pages:
    unpacked = dict(data)
    for name in ARRAYS_OF_PAGES:
        if name in data:
            unpacked[name] = _unpack(data[name])
    return pools.from_record(unpacked)


def _array_to_json(array: Any) -> dict[str, Any]:
    array = np.asarray(array)
    array = array.astype(array.dtype.newbyteorder("="))  # the dtype's name does not tell the byte order
    data = base64.b64encode(array.tobytes()).decode("ascii")
    return {"type": "array", "dtype": array.dtype.name, "shape": list(array.shape), "data": data}


def _array_from_json(data: Mapping[str, Any]) -> jax.Array | np.ndarray:
    """Return a JAX array, or a NumPy one where JAX would narrow it, as it does 64-bit integers."""
    try:
        flat = np.frombuffer(base64.b64decode(data["data"], validate=True), jnp.dtype(data["dtype"]))
        array = flat.reshape(data["shape"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"data holds an array that is not whole: {error}") from error
    if jax.dtypes.canonicalize_dtype(array.dtype) != array.dtype:
        return array
    return jnp.asarray(array)
