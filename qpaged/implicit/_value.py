"""The types that annotations and isinstance checks are about."""

from __future__ import annotations

from abc import ABC
from typing import Any, ClassVar, TypeGuard

import jax


class ArrayValue(ABC):  # noqa: B024 - a type to annotate with; it has no methods to require
    """Anything that stands for an array: a JAX array, traced or not, or an implicit one."""


ArrayValue.register(jax.Array)


class ImplicitValue(ArrayValue):
    """What the interpreter knows of an implicit array; `ImplicitArray` is its only subclass."""

    commute_ops: ClassVar[bool]
    warn_on_materialize: ClassVar[bool]
    shape: Any
    dtype: Any

    def materialize(self) -> Any:
        raise NotImplementedError

    @classmethod
    def default_handler(cls, primitive: Any, *args: Any, params: dict[str, Any] | None = None) -> Any:
        raise NotImplementedError


def is_implicit(value: Any) -> TypeGuard[ImplicitValue]:
    """Whether `value` is an implicit array."""
    return isinstance(value, ImplicitValue)
