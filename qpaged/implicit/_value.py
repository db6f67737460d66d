"""The types that handlers are annotated with and that `isinstance` checks ask for."""

from __future__ import annotations

from abc import ABC
from typing import Any, ClassVar, TypeGuard

import jax

from qpaged._compat import Location, Operand, Params, Primitive


class ArrayValue(ABC):  # noqa: B024 - a type to annotate with; it has no methods to require
    """Anything that stands for an array: a JAX array, traced or not, or an implicit one."""


ArrayValue.register(jax.Array)


class ImplicitValue(ArrayValue):
    """The part of an implicit array that the interpreter uses; `ImplicitArray` is its only subclass.

    It is a class of its own because `ImplicitArray` needs the interpreter, which needs this.
    """

    commute_ops: ClassVar[bool]
    warn_on_materialize: ClassVar[bool]
    has_derivative: ClassVar[bool]
    materializes_children_first: ClassVar[bool]
    shape: Any
    dtype: Any

    def materialize(self) -> Any:
        raise NotImplementedError

    def explicit_sharding(self) -> Any:
        """Return the sharding of the array on a mesh with Explicit axes, if the class can tell; else None.

        The trace of `materialize` says it otherwise.
        """
        return None

    def deferred(self) -> tuple[str, Location | None] | None:
        """Return a primitive whose work an array defers, and its line of code; None if it defers none.

        Such arrays stay within one program: what leaves it, or enters a loop, is materialized.
        """
        return None

    @classmethod
    def default_handler(cls, primitive: Primitive, *args: Operand, params: Params | None = None) -> Any:
        raise NotImplementedError


def is_implicit(value: object) -> TypeGuard[ImplicitValue]:
    """Return True if `value` is an implicit array."""
    return isinstance(value, ImplicitValue)
