"""The dictionary and JSON forms of the cache's classes."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, ClassVar, Self, TypeVar

import jax
import numpy as np

from qpaged import pools
from qpaged._arguments import shown
from qpaged._files import DIGEST, digest
from qpaged.cache._record_text import array_of_text_form, check_digest, to_text_form
from qpaged.formats import CacheFormat
from qpaged.implicit import ImplicitArray

VERSION = 2
READABLE = 1, VERSION  # the text of version 1 has no digest, and its arrays have no names
ARRAYS_OF_PAGES = ("codes", "scales", "outer")  # in the record of a quantized pool
PARTS_OF_EXACT_PAGES = ("codes", "rows", "page", "opened", "is_full", "is_sink")
PARTS_OF_POOLS = {"ExactPages": PARTS_OF_EXACT_PAGES, "QuantizedArray": ARRAYS_OF_PAGES, "ValuesInKeys": ()}
FIELDS_OF_PARTS = {
    "CacheFormat": {"key", "value", "layers"},
    "ExactPages": {"window", "sinks", *PARTS_OF_EXACT_PAGES},
    "QuantizedArray": {"quantizer", "dtype", *ARRAYS_OF_PAGES},
    "ValuesInKeys": {"shape", "dtype"},
    "array": {"name", "dtype", "shape", "data"},
}


R = TypeVar("R", bound="Serializable")


class Serializable:
    """A frozen dataclass that becomes a dictionary or JSON and back, bit for bit."""

    _classes: ClassVar[dict[str, type["Serializable"]]] = {}
    later_fields: ClassVar[frozenset[str]] = frozenset()
    """Fields that a record lacks where they have their defaults, as those of earlier versions do."""

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
            value = getattr(self, field.name)
            if field.name not in self.later_fields or value is not field.default:
                data[field.name] = _pack(value)
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Return the object that :meth:`to_dict` describes, or that JSON of :meth:`to_json` does.

        Raises:
            ValueError: another type or version, a missing or an unknown field, fields that do not fit each
                other, or a digest that is not that of the data.
        """
        return cls._read(data, needs_digest=False)

    @classmethod
    def _read(cls, data: Any, needs_digest: bool) -> Self:
        version = data.get("version") if isinstance(data, Mapping) else None
        try:
            if version == VERSION and (needs_digest or DIGEST in data):
                check_digest(data)
                data = {name: value for name, value in data.items() if name != DIGEST}
            return _Reader(version).read(cls, data, "")
        except (TypeError, AttributeError, LookupError, RecursionError, OverflowError, OSError) as error:
            raise ValueError(f"data of a {cls.__name__} cannot be read: {error!r}") from error

    @classmethod
    def check_record(cls, fields: Mapping[str, Any]) -> None:
        """Raise ValueError where fields of a record are of types that are never written."""

    def check_fields(self) -> None:
        """Raise ValueError where fields that were read do not fit each other."""

    def to_json(self, **kwargs: Any) -> str:
        """Return JSON text with a digest, and arrays as base64. ``kwargs`` go to ``json.dumps``."""
        record = to_text_form(self.to_dict())
        return json.dumps({**record, DIGEST: digest(record)}, **kwargs)

    @classmethod
    def from_json(cls, json_str: str) -> Self:
        """Return the object that :meth:`to_json` wrote, by this version of qpaged or an earlier one.

        Raises:
            ValueError: not JSON, or not of this class; see :meth:`from_dict`.
        """
        try:
            data = json.loads(json_str)
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(
                f"json_str must be the text that to_json writes of a {cls.__name__}, but got "
                f"{shown(json_str)}: {error}."
            ) from error
        return cls._read(data, needs_digest=True)


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


@dataclasses.dataclass(frozen=True)
class _Reader:
    """Reads a record and the records in it, which must all be of one version."""

    version: Any

    def read(self, cls: type[R], data: Any, path: str) -> R:
        """Return the object that a record describes; ``path`` leads to it from the outermost record."""
        type_name = version = None
        if isinstance(data, Mapping):
            type_name, version = data.get("type"), data.get("version")
        known_version = type(version) is int and version in READABLE and version == self.version
        if type_name != cls.__name__ or not known_version:
            raise ValueError(
                f"data must hold a {cls.__name__} of version {VERSION}, or one earlier, but holds type "
                f"{type_name!r}, version {version!r}; read it with the class and the qpaged that wrote it."
            )
        given = {name: value for name, value in data.items() if name not in ("type", "version")}
        known = {field.name for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
        missing = known - cls.later_fields - given.keys()
        if missing or given.keys() - known:
            differences = {"lacks": missing, "has unknown": given.keys() - known}
            faults = [
                f"{fault} {', '.join(sorted(map(str, names)))}"
                for fault, names in differences.items()
                if names
            ]
            raise ValueError(
                f"data of a {cls.__name__} {' and '.join(faults)}; it must be what to_dict or to_json wrote."
            )
        cls.check_record(given)
        made = cls(**{name: self._part(value, f"{path}/{name}") for name, value in given.items()})
        made.check_fields()
        return made

    def _part(self, value: Any, path: str) -> Any:
        """Return what :func:`_pack` was given; ValueError says what is wrong with what it never returns."""
        if isinstance(value, list):
            return [self._part(item, f"{path}/{index}") for index, item in enumerate(value)]
        if not isinstance(value, Mapping):
            return value
        type_name = str(value.get("type"))
        unknown = value.keys() - {"type"} - FIELDS_OF_PARTS.get(type_name, value.keys())
        if unknown:
            raise ValueError(
                f"data of a {type_name} has unknown {', '.join(sorted(map(str, unknown)))}; it must be what "
                f"to_dict or to_json wrote."
            )
        if type_name in Serializable._classes:
            return self.read(Serializable._classes[type_name], value, path)
        if type_name == "CacheFormat":
            return CacheFormat.from_config(value)
        if type_name == "array":
            return array_of_text_form(value, None if self.version == 1 else path)
        if type_name in PARTS_OF_POOLS:
            names = [name for name in PARTS_OF_POOLS[type_name] if name in value]
            parts = {name: self._part(value[name], f"{path}/{name}") for name in names}
            return pools.from_record({**value, **parts})
        raise ValueError(
            f"data holds a part of unknown type {type_name!r}; it was not written by this version of qpaged."
        )
