"""The fields of implicit arrays: auxiliary data, and the declared shape and dtype."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

_AUX = "qpaged.implicit.aux"


class UninitializedAval(Exception):
    """Raised when an implicit array's shape or dtype is read before anything has set it."""

    def __init__(self, owner: type, name: str):
        super().__init__(
            f"{owner.__name__}.{name} is not known. Give one of: the keyword argument {name}=, the class "
            f"variable default_{name}, a compute_{name}() method, or a materialize() that does not read "
            f"{name}, from which it can be inferred."
        )


if TYPE_CHECKING:  # checkers know what has a default, and what not, by this name only
    from dataclasses import field as aux_field
else:

    def aux_field(metadata: Mapping[str, Any] | None = None, **kwargs: Any) -> Any:
        """A dataclass field that is static data of the pytree, not one of its children.

        Its values must be hashable and comparable, for they become part of the tree's structure. Takes
        the arguments of `dataclasses.field`.
        """
        return dataclasses.field(metadata={**(metadata or {}), _AUX: True}, **kwargs)


class Declared:
    """A shape or dtype that is stored, normalised, and refuses to be read before it is set."""

    def __init__(self, name: str):
        self.name = name
        self.slot = f"_declared_{name}"

    def __get__(self, instance: Any, owner: type) -> Any:
        if instance is None:
            return None  # what dataclasses take as the default
        value = self.peek(instance)
        if value is None:
            raise UninitializedAval(type(instance), self.name)
        return value

    def __set__(self, instance: Any, value: Any) -> None:
        instance.__dict__[self.slot] = _normalised(self.name, value)

    def peek(self, instance: Any) -> Any:
        return instance.__dict__.get(self.slot)


def _normalised(name: str, value: Any) -> Any:
    """One spelling per value, so that equal arrays have equal tree structures."""
    if value is None:
        return None
    if name == "shape":
        return tuple(value)
    try:
        return np.dtype(value)
    except TypeError:  # JAX's extended dtypes, such as those of random keys
        return value


def stores(cls: type, name: str) -> bool:
    """Whether a class keeps its shape or dtype in the field, rather than deriving it in a property."""
    attribute = _class_attribute(cls, name)
    return isinstance(attribute, Declared) or not hasattr(attribute, "__get__")


def peek(instance: Any, name: str) -> Any:
    """The value of a field, or None where a stored shape or dtype is not set yet."""
    attribute = _class_attribute(type(instance), name)
    return attribute.peek(instance) if isinstance(attribute, Declared) else getattr(instance, name)


def children_and_aux(cls: type) -> Iterator[tuple[str, bool]]:
    """Names of the fields that the pytree holds, each with whether it is auxiliary.

    A shape or dtype that the class derives in a property is not data, so it is left out.
    """
    for field in dataclasses.fields(cls):
        if field.name in ("shape", "dtype") and not stores(cls, field.name):
            continue
        yield field.name, bool(field.metadata.get(_AUX))


def _class_attribute(cls: type, name: str) -> Any:
    return next((vars(parent)[name] for parent in cls.__mro__ if name in vars(parent)), None)
