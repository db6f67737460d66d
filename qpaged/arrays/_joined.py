"""Joined: arrays put one after the other along an axis, held apart.

What models make of a cache and the tokens of the call before a dot. The dot is then taken of each part, and
the results are joined, or added where the axis is contracted: a quantized part is not decoded.
"""

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax

from qpaged._compat import Location, Primitive, reshard_primitives
from qpaged.arrays._along_axis import axis_after, params_of_piece
from qpaged.arrays._dtypes import are_floats, common_dtype
from qpaged.arrays._scaled_dot import DotAxes, with_operands_swapped
from qpaged.implicit import ImplicitArray, aux_field, materialize_nested, primitive_handler

if TYPE_CHECKING:
    Operand: TypeAlias = Any
else:
    Operand = object  # what qax dispatches on as anything whatever

BEFORE_REPEATED = 3
ARITHMETIC = ["add", "div", "max", "min", "mul", "sub"]


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

    def deferred(self) -> tuple[str, Location | None] | None:
        """Return what one of the parts defers."""
        for part in self.parts:
            deferred = part.deferred() if isinstance(part, ImplicitArray) else None
            if deferred is not None:
                return deferred
        return None

    def map(self, function: Callable[[Any], Any], axis: int | None = None) -> "Joined":
        """Return the array of ``function(part)`` of each part, joined along ``axis`` from the start."""
        parts = tuple(map(function, self.parts))
        return Joined(parts, self.axis if axis is None else axis - parts[0].ndim)


@primitive_handler(["convert_element_type", "neg", "squeeze", "transpose"])
def _each_part(primitive, joined: Joined, **params):
    return part_by_part(primitive, [joined], params)


@primitive_handler(["broadcast_in_dim", "reshape"])
def _each_part_resized(primitive, joined: Joined, *rest, **params):
    return NotImplemented if rest else part_by_part(primitive, [joined], params)


@primitive_handler(ARITHMETIC, precedence=BEFORE_REPEATED)
def _arithmetic_left(primitive, left: Joined, right: Operand, **params):
    return part_by_part(primitive, [left, right], params)


@primitive_handler(ARITHMETIC, precedence=BEFORE_REPEATED)
def _arithmetic_right(primitive, left: Operand, right: Joined, **params):
    return part_by_part(primitive, [left, right], params)


@primitive_handler(ARITHMETIC, precedence=BEFORE_REPEATED)
def _arithmetic_both(primitive, left: Joined, right: Joined, **params):
    return part_by_part(primitive, [left, right], params)


def part_by_part(primitive: Primitive, operands: Sequence[Operand], params: Mapping[str, Any]) -> Any:
    """Return the joined results of a primitive for the parts of its operands, some of which are joined.

    NotImplemented where it mixes the parts, or where operands are joined of other parts.
    """
    joined = next(operand for operand in operands if isinstance(operand, Joined))
    axis = joined.axis % joined.ndim
    after = axis_after(primitive.name, params, joined.shape, axis)
    pieces = [_pieces(operand, joined) for operand in operands]
    if after is None or None in pieces:
        return NotImplemented
    parts = []
    inner: Sequence[Operand]
    for length, *inner in zip(joined.lengths, *pieces, strict=True):
        parts.append(primitive.bind(*inner, **params_of_piece(primitive.name, params, after, length)))
    return Joined(tuple(parts), after - parts[0].ndim)


def _pieces(operand: Operand, joined: Joined) -> Sequence[Operand] | None:
    """Return the pieces of an operand that belong to the parts of another; None if they are not to be had."""
    if isinstance(operand, Joined):
        alike = (operand.axis, operand.lengths) == (joined.axis, joined.lengths)
        return operand.parts if alike else None
    if isinstance(operand, ImplicitArray):
        return None
    if jnp.ndim(operand) == 0 or operand.shape[joined.axis] == 1 != joined.shape[joined.axis]:
        return [operand] * len(joined.parts)
    if operand.shape[joined.axis] != joined.shape[joined.axis]:
        return None  # it stretches the joined array
    return _cut(operand, joined.lengths, joined.axis % joined.ndim)


def _cut(operand: jax.Array, lengths: Sequence[int], axis: int) -> list[jax.Array]:
    ends = list(itertools.accumulate(lengths))
    bounds = zip([0, *ends], ends, strict=False)
    return [lax.slice_in_dim(operand, start, end, axis=axis) for start, end in bounds]


@primitive_handler(reshard_primitives())
def _reshard(primitive, joined: Joined, *, dst_sharding, **params):
    """Place each part; where the joined axis goes to several devices, the parts are joined first."""
    spec = (*dst_sharding.spec, *[None] * joined.ndim)
    if spec[joined.axis % joined.ndim] is not None:
        return NotImplemented
    return joined.map(lambda part: primitive.bind(part, dst_sharding=dst_sharding, **params))


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
    if isinstance(other, ImplicitArray) or axis in axes.batch or not are_floats(other, joined):
        return NotImplemented

    def dot(other: jax.Array, part: Any, dtype: Any) -> jax.Array:
        return lax.dot_general(other, part, axes.numbers, preferred_element_type=dtype, **params)

    dtype = preferred_element_type or common_dtype(other.dtype, joined.dtype)
    if axis not in axes.contract:
        outs = [dot(other, part, dtype) for part in joined.parts]
        kept_from_end = len(axes.kept(joined.ndim)) - axes.kept(joined.ndim).index(axis)
        return lax.concatenate(outs, outs[0].ndim - kept_from_end)
    cut = axes.other_contract[axes.contract.index(axis)]
    wide = common_dtype(dtype, jnp.float32)  # in which the sums are added, to be rounded once
    rows_of_parts = _cut(other, joined.lengths, cut)
    sums = [dot(rows, part, wide) for rows, part in zip(rows_of_parts, joined.parts, strict=True)]
    return functools.reduce(jnp.add, sums).astype(dtype)
