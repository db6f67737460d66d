"""Joined: arrays put one after the other along an axis, held apart.

What models make of a cache and the tokens of the call before a dot. The dot is then taken of each part, and
the results are joined, or added where the axis is contracted: a quantized part is not decoded.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax

from qpaged._compat import reshard_primitives
from qpaged.arrays._dtypes import common_dtype
from qpaged.arrays._scaled_dot import DotAxes, with_operands_swapped
from qpaged.implicit import ImplicitArray, aux_field, materialize_nested, primitive_handler
from qpaged.implicit._facts import axis_after_reshape

if TYPE_CHECKING:
    Operand: TypeAlias = Any
else:
    Operand = object  # what qax dispatches on as anything whatever

BEFORE_REPEATED = 2


@dataclass(eq=False)
class Joined(ImplicitArray):
    """``jnp.concatenate(parts, axis)``.

    Attributes:
        parts: plain or implicit, alike in dtype and in all lengths but that of the axis.
        axis: static; counted from the end, so that an axis that ``vmap`` adds must come first.
    """

    materializes_children_first = True  # implicit parts are joined lazily

    parts: tuple[Any, ...]
    axis: int = aux_field()

    def __post_init__(self) -> None:
        """Nothing to infer: shape and dtype are those of the parts."""

    @property  # type: ignore[misc]  # in place of fields, as the base class allows
    def shape(self) -> tuple[int, ...]:
        shape = list(self.parts[0].shape)
        shape[self.axis] = sum(self.lengths)
        return tuple(shape)

    @shape.setter
    def shape(self, _: Any) -> None:
        """Ignored: it would go stale."""

    @property  # type: ignore[misc]
    def dtype(self) -> Any:
        return self.parts[0].dtype

    @dtype.setter
    def dtype(self, _: Any) -> None:
        """Ignored: it would go stale."""

    @property
    def lengths(self) -> list[int]:
        """The length of each part along the axis."""
        return [part.shape[self.axis] for part in self.parts]

    def materialize(self) -> jax.Array:
        """Return the values, joined; quantized parts are decoded."""
        parts = [materialize_nested(part, full=True) for part in self.parts]  # if a program calls this
        return lax.concatenate(parts, self.axis % self.ndim)

    def map(self, function: Callable[[Any], Any], axis: int | None = None) -> "Joined":
        """Return the array of ``function(part)`` of each part, joined along ``axis`` from the start."""
        parts = tuple(map(function, self.parts))
        return Joined(parts, self.axis if axis is None else axis - parts[0].ndim)


@primitive_handler(["convert_element_type", "neg"])
def _each_element(primitive, joined: Joined, **params):
    return joined.map(lambda part: primitive.bind(part, **params))


@primitive_handler(["mul", "div"])
def _scale(primitive, joined: Joined, factor: Operand, **params):
    if isinstance(factor, ImplicitArray) or jnp.ndim(factor):
        return NotImplemented
    return joined.map(lambda part: primitive.bind(part, factor, **params))


@primitive_handler(reshard_primitives())
def _reshard(primitive, joined: Joined, *, dst_sharding, **params):
    """Place each part; where the joined axis goes to several devices, the parts are joined first."""
    spec = (*dst_sharding.spec, *[None] * joined.ndim)
    if spec[joined.axis % joined.ndim] is not None:
        return NotImplemented
    return joined.map(lambda part: primitive.bind(part, dst_sharding=dst_sharding, **params))


@primitive_handler("transpose")
def _transpose(primitive, joined: Joined, *, permutation, **params):
    axis = tuple(permutation).index(joined.axis % joined.ndim)
    return joined.map(lambda part: lax.transpose(part, permutation), axis)


@primitive_handler("squeeze")
def _squeeze(primitive, joined: Joined, *, dimensions, **params):
    axis = joined.axis % joined.ndim
    after = axis - sum(dimension < axis for dimension in dimensions)
    return joined.map(lambda part: lax.squeeze(part, dimensions), after)


@primitive_handler("reshape")
def _reshape(primitive, joined: Joined, *rest, new_sizes, dimensions=None, **params):
    """Reshape each part, where the joined axis stays an axis, with as many elements before it."""
    axis = joined.axis % joined.ndim
    after = axis_after_reshape(joined.shape, axis, new_sizes)
    if dimensions is not None or after is None:
        return NotImplemented
    return joined.map(lambda part: lax.reshape(part, _resized(new_sizes, after, part, axis)), after)


@primitive_handler("broadcast_in_dim")
def _broadcast(primitive, joined: Joined, *rest, shape, broadcast_dimensions, **params):
    axis = joined.axis % joined.ndim
    after = broadcast_dimensions[axis]
    if shape[after] != joined.shape[axis]:
        return NotImplemented

    def stretch(part: Any) -> Any:
        return lax.broadcast_in_dim(part, _resized(shape, after, part, axis), broadcast_dimensions)

    return joined.map(stretch, after)


@primitive_handler("slice")
def _slice(primitive, joined: Joined, *, start_indices, limit_indices, strides, **params):
    """Slice each part: along the joined axis, by what lies in it."""
    axis = joined.axis % joined.ndim
    steps = strides or (1,) * joined.ndim
    if steps[axis] != 1:
        return NotImplemented
    parts, begin = [], 0
    for part, length in zip(joined.parts, joined.lengths, strict=True):
        start, limit = list(start_indices), list(limit_indices)
        start[axis] = min(max(start[axis] - begin, 0), length)
        limit[axis] = min(max(limit[axis] - begin, 0), length)
        parts.append(lax.slice(part, start, limit, steps))
        begin += length
    parts = [part for part in parts if part.shape[axis]] or parts[:1]
    return parts[0] if len(parts) == 1 else Joined(tuple(parts), joined.axis)


def _resized(shape: Sequence[int], axis: int, part: Any, axis_of_part: int) -> tuple[int, ...]:
    """Return a shape with a part's length along the joined axis."""
    return (*shape[:axis], part.shape[axis_of_part], *shape[axis + 1 :])


@primitive_handler("dot_general", precedence=BEFORE_REPEATED)
def _dot_left(primitive, lhs: Joined, rhs: Operand, *, dimension_numbers, **params):
    (lhs_contract, rhs_contract), (lhs_batch, rhs_batch) = dimension_numbers
    out = _dot(rhs, lhs, DotAxes.of(rhs_contract, lhs_contract, rhs_batch, lhs_batch), **params)
    if out is NotImplemented:
        return out
    return with_operands_swapped(out, len(rhs_batch), jnp.ndim(rhs) - len(rhs_contract))


@primitive_handler("dot_general", precedence=BEFORE_REPEATED)
def _dot_right(primitive, lhs: Operand, rhs: Joined, *, dimension_numbers, **params):
    (lhs_contract, rhs_contract), (lhs_batch, rhs_batch) = dimension_numbers
    return _dot(lhs, rhs, DotAxes.of(lhs_contract, rhs_contract, lhs_batch, rhs_batch), **params)


@primitive_handler("dot_general", precedence=BEFORE_REPEATED)
def _dot_both(primitive, lhs: Joined, rhs: Joined, *, dimension_numbers, **params):
    return NotImplemented


def _dot(
    other: Operand, joined: Joined, axes: DotAxes, *, preferred_element_type: Any = None, **params: Any
) -> Any:
    """Return the dot of a plain operand and joined parts, in that order."""
    axis = joined.axis % joined.ndim
    if isinstance(other, ImplicitArray) or axis in axes.batch:
        return NotImplemented

    def dot(other: jax.Array, part: Any, dtype: Any) -> jax.Array:
        return lax.dot_general(other, part, axes.numbers, preferred_element_type=dtype, **params)

    dtype = preferred_element_type or common_dtype(other.dtype, joined.dtype)
    if axis not in axes.contract:
        outs = [dot(other, part, dtype) for part in joined.parts]
        kept_from_end = len(axes.kept(joined.ndim)) - axes.kept(joined.ndim).index(axis)
        return lax.concatenate(outs, outs[0].ndim - kept_from_end)
    cut = axes.other_contract[axes.contract.index(axis)]
    ends = list(itertools.accumulate(joined.lengths))[:-1]
    wide = jnp.promote_types(dtype, jnp.float32)  # in which the sums are added, to be rounded once
    rows_of_parts = jnp.split(other, ends, axis=cut)
    sums = [dot(rows, part, wide) for rows, part in zip(rows_of_parts, joined.parts, strict=True)]
    return functools.reduce(jnp.add, sums).astype(dtype)
