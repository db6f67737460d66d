"""The fields of implicit arrays: static data, and the logical shape and dtype."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from qpaged._compat import DType

_AUX_KEY = "qpaged.implicit.aux"


class UninitializedAval(Exception):
    """Raised when an implicit array's shape or dtype is read before anything has set it."""

    def __init__(self, owner: type, name: str):
        super().__init__(
            f"{owner.__name__}.{name} is not known. Give one of: the keyword argument {name}=, the class "
            f"variable default_{name}, a compute_{name}() method, or a materialize() that does not read "
            f"{name}, from which it can be inferred."
        )


if TYPE_CHECKING:  # type checkers recognise dataclass fields by this function only
    from dataclasses import field as aux_field
else:

    def aux_field(metadata: Mapping[str, Any] | None = None, **kwargs: Any) -> Any:
        """Return a dataclass field that is static data of the pytree, not one of its children.

        Its values must be hashable and comparable, because they become part of the tree's structure. Takes
        the arguments of `dataclasses.field`.
        """
        return dataclasses.field(metadata={**(metadata or {}), _AUX_KEY: True}, **kwargs)


class LogicalAttribute:
    """A descriptor of a stored shape or dtype: it normalises what is set, and raises if read before that."""

    def __init__(self, name: str):
        self.name = name
        self._key = f"_declared_{name}"  # another key, because `name` itself is the descriptor's

    def __get__(self, instance: object, owner: type) -> Any:
        if instance is None:
            return None  # dataclasses read the default of a field from the class
        value = self.read_or_none(instance)
        if value is None:
            raise UninitializedAval(type(instance), self.name)
        return value

    def __set__(self, instance: object, value: Any) -> None:
        instance.__dict__[self._key] = _normalised(self.name, value)

    def read_or_none(self, instance: object) -> Any:
        return instance.__dict__.get(self._key)


def _normalised(name: str, value: Any) -> Any:
    # Auxiliary data is part of the tree structure, so equal values must have one spelling.
    if value is None:
        return None
    if name == "shape":
        return tuple(value)
    return normalised_dtype(value)


def normalised_dtype(dtype: DType) -> DType:
    """Return a dtype as NumPy's class, or as it is if it is an extended dtype of JAX, as of random keys."""
    try:
        return np.dtype(dtype)
    except TypeError:
        return dtype


def is_stored(cls: type, name: str) -> bool:
    """Return True if a class stores its shape or dtype in a field; False if a property derives it."""
    attribute = _class_attribute(cls, name)
    return isinstance(attribute, LogicalAttribute) or not hasattr(attribute, "__get__")


def read_or_none(instance: object, name: str) -> Any:
    """Return the value of a field, or None if it is a stored shape or dtype that is not set yet."""
    attribute = _class_attribute(type(instance), name)
    if isinstance(attribute, LogicalAttribute):
        return attribute.read_or_none(instance)
    return getattr(instance, name)


def children_and_aux(cls: type) -> Iterator[tuple[str, bool]]:
    """Yield the name of every field that the pytree holds, with True if it is auxiliary data.

    A shape or dtype that a property derives from other fields is not data, so it is left out.
    """
    for field in dataclasses.fields(cls):
        if field.name in ("shape", "dtype") and not is_stored(cls, field.name):
            continue
        yield field.name, bool(field.metadata.get(_AUX_KEY))


def _class_attribute(cls: type, name: str) -> Any:
    # getattr would call the descriptor; this returns the descriptor itself.
    for parent in cls.__mro__:
        if name in vars(parent):
            return vars(parent)[name]
    return None
