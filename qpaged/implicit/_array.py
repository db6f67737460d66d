"""`ImplicitArray`: what stands for an array without being one."""

from __future__ import annotations

import dataclasses
import math
import warnings
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import jax

from qpaged import _compat
from qpaged.implicit import _fields
from qpaged.implicit._fields import Declared, UninitializedAval, aux_field
from qpaged.implicit._interpreter import logical_struct, materialize_and_bind
from qpaged.implicit._value import ImplicitValue


@dataclasses.dataclass(eq=False)
class ImplicitArray(ImplicitValue):
    """An array of some shape and dtype that is represented in another way than as a dense array.

    Subclass it as a dataclass and define `materialize()`. Fields are children of a pytree, those made
    with `aux_field` its static data; the class is registered with JAX when it is defined. Instances
    are arguments of functions decorated with `use_implicit_args`.

    The logical shape and dtype come from, first found first taken: the keyword arguments `shape` and
    `dtype`; a `__post_init__` that sets them before calling this one; `compute_shape()` and
    `compute_dtype()`; the class variables `default_shape` and `default_dtype`; the trace of
    `materialize()`. A subclass may instead define `shape` or `dtype` as properties of its children,
    with a setter that does nothing: then nothing can go stale under transformations.

    Scanned over, an array is sliced leaf by leaf; in shard_map it is divided leaf by leaf. It is
    materialized where shapes tell that this is not the same as slicing or dividing what it stands for.
    They cannot tell when `materialize()` mixes elements along that axis and keeps its length, as a
    normalisation does: give such a class no leaf with that axis in front, or materialize it first.

    Class keywords:
        commute_ops: operands of commutative primitives trade places so that the implicit one is
            first. On by default.
        warn_on_materialize: warn when there is no handler. On by default.
    """

    commute_ops: ClassVar[bool] = True
    warn_on_materialize: ClassVar[bool] = True
    default_shape: ClassVar[Sequence[int] | None] = None
    default_dtype: ClassVar[Any] = None

    shape: Any = aux_field(kw_only=True, default=None)  # noqa: RUF009 - a dataclass field
    dtype: Any = aux_field(kw_only=True, default=None)  # noqa: RUF009

    def __init_subclass__(
        cls, commute_ops: bool = True, warn_on_materialize: bool = True, **kwargs: Any
    ) -> None:
        super().__init_subclass__(**kwargs)
        cls.commute_ops = commute_ops
        cls.warn_on_materialize = warn_on_materialize
        # The methods are looked up when they are called, so that subclasses may override them.
        jax.tree_util.register_pytree_with_keys(
            cls,
            lambda array: array.tree_flatten_with_keys(),
            lambda aux, children: cls.tree_unflatten(aux, children),
        )

    def __post_init__(self) -> None:
        for name, compute in (("shape", self.compute_shape), ("dtype", self.compute_dtype)):
            if _fields.peek(self, name) is None:
                setattr(self, name, compute())
        try:
            self._agree_with(logical_struct(self))
        except UninitializedAval:  # materialize() needs to know what nobody said
            for name in ("shape", "dtype"):
                getattr(self, name)  # raises for the one that is missing
            raise

    def _agree_with(self, struct: Any) -> None:
        for name in ("shape", "dtype"):
            declared, found = _fields.peek(self, name), getattr(struct, name)
            if declared is None:
                setattr(self, name, found)
            elif declared != found:
                warnings.warn(
                    f"{type(self).__name__} was declared with {name} {declared}, but materialize() returns "
                    f"{found}. Correct the {name}, or materialize().",
                    stacklevel=4,
                )

    @abstractmethod
    def materialize(self) -> jax.Array:
        """The dense array that this stands for."""

    def compute_shape(self) -> Sequence[int] | None:
        """The shape, where it follows from other fields. Override it; by default `default_shape`."""
        return self.default_shape

    def compute_dtype(self) -> Any:
        """The dtype, where it follows from other fields. Override it; by default `default_dtype`."""
        return self.default_dtype

    @property
    def aval(self) -> Any:
        """Shape and dtype as JAX's abstract value."""
        return _compat.ShapedArray(self.shape, self.dtype)

    @property
    def ndim(self) -> int:
        """Number of logical axes."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of logical elements."""
        return math.prod(self.shape)

    @classmethod
    def default_handler(cls, primitive: Any, *args: Any, params: dict[str, Any] | None = None) -> Any:
        """What a primitive does that no handler took: materialize the operands and apply it to those."""
        return materialize_and_bind(primitive, args, params or {})

    def tree_flatten_with_keys(self) -> tuple[list[tuple[Any, Any]], tuple[Any, ...]]:
        """Children with their keys, and auxiliary data, in the order of the fields."""
        children: list[tuple[Any, Any]] = []
        aux: list[Any] = []
        for name, is_aux in _fields.children_and_aux(type(self)):
            value = _fields.peek(self, name)
            if is_aux:
                aux.append(value)
            else:
                children.append((jax.tree_util.GetAttrKey(name), value))
        return children, tuple(aux)

    @classmethod
    def tree_unflatten(cls, aux_data: Iterable[Any], children: Iterable[Any]) -> Any:
        """An instance of any children whatever; `__post_init__` does not run."""
        array = object.__new__(cls)
        aux, leaves = iter(aux_data), iter(children)
        for name, is_aux in _fields.children_and_aux(cls):
            object.__setattr__(array, name, next(aux if is_aux else leaves))
        return array


# After the dataclass is made, which needs the plain fields: from here on they are stored normalised.
ImplicitArray.shape = Declared("shape")
ImplicitArray.dtype = Declared("dtype")
