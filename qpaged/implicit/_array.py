"""`ImplicitArray`, the class that users subclass to represent an array in their own way."""

from __future__ import annotations

import dataclasses
import math
import warnings
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import jax

from qpaged._compat import Operand, Params, Primitive, ShapedArray
from qpaged.implicit import _fields
from qpaged.implicit._fields import LogicalAttribute, UninitializedAval, aux_field
from qpaged.implicit._interpreter import logical_struct, materialize_and_bind
from qpaged.implicit._value import ImplicitValue


@dataclasses.dataclass(eq=False)  # a generated __eq__ would compare arrays, and remove __hash__
class ImplicitArray(ImplicitValue):
    """An array of some shape and dtype that is not stored as a dense array.

    Subclass it as a dataclass and define `materialize()`. Fields are children of a pytree, those made
    with `aux_field` its static data; the class is registered with JAX when it is defined. Instances
    are arguments of functions decorated with `use_implicit_args`.

    The logical shape and dtype come from the first of these that gives one: the keyword arguments `shape`
    and `dtype`; a `__post_init__` that sets them before calling this one; `compute_shape()` and
    `compute_dtype()`; the class variables `default_shape` and `default_dtype`; the trace of
    `materialize()`. A subclass may instead define `shape` or `dtype` as properties of its children,
    with a setter that does nothing: then nothing can go stale under transformations.

    `scan` slices an array leaf by leaf, and `shard_map` divides it leaf by leaf. The array is materialized
    first if the shapes show that this differs from slicing or dividing the dense array. Shapes cannot show
    it when `materialize()` mixes elements along that axis and keeps its length, as a normalisation does:
    give such a class no leaf with that axis in front, or materialize it first.

    Class keywords:
        commute_ops: swap the operands of commutative primitives so that the implicit one is first.
            On by default.
        warn_on_materialize: warn when there is no handler. On by default.
    """

    commute_ops: ClassVar[bool] = True
    warn_on_materialize: ClassVar[bool] = True
    default_shape: ClassVar[Sequence[int] | None] = None
    default_dtype: ClassVar[Any] = None

    has_derivative: ClassVar[bool] = True
    """False for a class whose children carry no derivative, as codes and scales that are fitted to data: such
    arrays pass through functions with custom derivatives as they are."""
    materializes_children_first: ClassVar[bool] = False
    """True for a class whose `materialize` is given arrays in place of its implicit children: what it does to
    implicit ones would make an array of its own class again, without end."""
    shape: Any = aux_field(kw_only=True, default=None)  # noqa: RUF009 - a dataclass field
    dtype: Any = aux_field(kw_only=True, default=None)  # noqa: RUF009

    def __init_subclass__(
        cls, commute_ops: bool = True, warn_on_materialize: bool = True, **kwargs: Any
    ) -> None:
        super().__init_subclass__(**kwargs)
        cls.commute_ops = commute_ops
        cls.warn_on_materialize = warn_on_materialize
        # The methods are looked up at every call, so that replacing one on the class later has an effect.
        jax.tree_util.register_pytree_with_keys(
            cls,
            lambda array: array.tree_flatten_with_keys(),
            lambda aux, children: cls.tree_unflatten(aux, children),
            lambda array: array.tree_flatten(),
        )

    def __post_init__(self) -> None:
        if _fields.read_or_none(self, "shape") is None:
            self.shape = self.compute_shape()
        if _fields.read_or_none(self, "dtype") is None:
            self.dtype = self.compute_dtype()
        try:
            materialized = logical_struct(self)
        except UninitializedAval:  # materialize() reads a shape or dtype that nothing has set
            _ = self.shape, self.dtype  # raises for the one that is missing
            raise
        except (TypeError, ValueError):
            if not self._is_stack():
                raise
            return
        self._set_or_compare("shape", materialized.shape)
        self._set_or_compare("dtype", materialized.dtype)

    def _is_stack(self) -> bool:
        """Return True if the children are those of several arrays, stacked for vmap: one of them fits.

        A shape and a dtype that are given are then believed, and are those of one.
        """
        if None in (_fields.read_or_none(self, "shape"), _fields.read_or_none(self, "dtype")):
            return False
        one = self
        while all(child.ndim for child in jax.tree_util.tree_leaves(one)):
            one = jax.tree_util.tree_map(
                lambda child: jax.ShapeDtypeStruct(child.shape[1:], child.dtype), one
            )
            try:
                logical_struct(one)
            except (TypeError, ValueError):
                continue
            return True
        return False

    def _set_or_compare(self, name: str, materialized: Any) -> None:
        """Set the shape or dtype to that of `materialize()`, or warn if another was declared."""
        declared = _fields.read_or_none(self, name)
        if declared is None:
            setattr(self, name, materialized)
        elif declared != materialized:
            warnings.warn(
                f"{type(self).__name__} was declared with {name} {declared}, but materialize() returns "
                f"{materialized}. Correct the {name}, or materialize().",
                stacklevel=4,  # past __post_init__ and the dataclass's __init__
            )

    @abstractmethod
    def materialize(self) -> jax.Array:
        """Return the dense array that this stands for."""

    def compute_shape(self) -> Sequence[int] | None:
        """Return the shape if other fields determine it; override this. By default, `default_shape`."""
        return self.default_shape

    def compute_dtype(self) -> Any:
        """Return the dtype if other fields determine it; override this. By default, `default_dtype`."""
        return self.default_dtype

    @property
    def aval(self) -> ShapedArray:
        """Shape and dtype as JAX's abstract value."""
        return ShapedArray(self.shape, self.dtype)

    @property
    def ndim(self) -> int:
        """Number of logical axes."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of logical elements."""
        return math.prod(self.shape)

    @classmethod
    def default_handler(cls, primitive: Primitive, *args: Operand, params: Params | None = None) -> Any:
        """Apply a primitive that no handler took to the materialized operands."""
        return materialize_and_bind(primitive, args, params or {})

    def tree_flatten_with_keys(self) -> tuple[list[tuple[Any, Any]], tuple[Any, ...]]:
        """Return the children with their keys, and the auxiliary data, in the order of the fields."""
        children: list[tuple[Any, Any]] = []
        aux: list[Any] = []
        for name, is_aux in _fields.children_and_aux(type(self)):
            value = _fields.read_or_none(self, name)
            if is_aux:
                aux.append(value)
            else:
                children.append((jax.tree_util.GetAttrKey(name), value))
        return children, tuple(aux)

    def tree_flatten(self) -> tuple[list[Any], tuple[Any, ...]]:
        """Return the children and the auxiliary data; every call of a jitted function asks for them."""
        children, aux = self.tree_flatten_with_keys()
        return [child for _, child in children], aux

    @classmethod
    def tree_unflatten(cls, aux_data: Iterable[Any], children: Iterable[Any]) -> Any:
        """Return an instance with the given children, which may be anything; `__post_init__` does not run."""
        array = object.__new__(cls)
        remaining_aux = iter(aux_data)
        remaining_children = iter(children)
        for name, is_aux in _fields.children_and_aux(cls):
            value = next(remaining_aux if is_aux else remaining_children)
            object.__setattr__(array, name, value)  # the subclass may be a frozen dataclass
        return array


# `@dataclass` needed plain fields with defaults; only now may the descriptors take their place.
ImplicitArray.shape = LogicalAttribute("shape")
ImplicitArray.dtype = LogicalAttribute("dtype")
