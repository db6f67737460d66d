"""Repeated: an array along one axis of which each element stands several times, held once.

What models with grouped heads make of their keys and values before a dot. The dot is then that of the array
itself, with the other operand's axis taken apart into groups, and nothing is copied.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import jax.numpy as jnp
from jax import lax

from qpaged._compat import Location, reshard_primitives
from qpaged.arrays._lazily import lazily
from qpaged.arrays._scaled_dot import with_operands_swapped
from qpaged.implicit import ImplicitArray, aux_field, primitive_handler

if TYPE_CHECKING:
    Operand: TypeAlias = Any
else:
    Operand = object  # what qax dispatches on as anything whatever

BEFORE_DEFERRED = 2


@dataclass(eq=False)
class Repeated(ImplicitArray, warn_on_materialize=False):
    """``jnp.repeat(array, times, axis)``.

    What has no handler for it has it copied out: the copies of a quantized array are quantized, too.

    Attributes:
        array: plain or implicit.
        axis: static; counted from the end, so that an axis that ``vmap`` adds must come first.
        times: static.
    """

    array: Any
    axis: int = aux_field()
    times: int = aux_field()

    def __post_init__(self) -> None:
        """Nothing to infer: shape and dtype are the array's."""

    @property  # type: ignore[misc]  # in place of fields, as the base class allows
    def shape(self) -> tuple[int, ...]:
        shape = list(self.array.shape)
        shape[self.axis] *= self.times
        return tuple(shape)

    @shape.setter
    def shape(self, _: Any) -> None:
        """Ignored: it would go stale."""

    @property  # type: ignore[misc]
    def dtype(self) -> Any:
        return self.array.dtype

    @dtype.setter
    def dtype(self, _: Any) -> None:
        """Ignored: it would go stale."""

    def materialize(self) -> Any:
        """The copies, of the kind that the array is."""
        return _copies(self.array, self.axis, self.times)

    def deferred(self) -> tuple[str, Location | None] | None:
        """Return what the array defers."""
        deferred: tuple[str, Location | None] | None = None
        if isinstance(self.array, ImplicitArray):
            deferred = self.array.deferred()
        return deferred

    def over(self, array: Any) -> "Repeated":
        """The same of another array."""
        return Repeated(array, self.axis, self.times)


def stretched_axes(
    array: Any, shape: Sequence[int], dimensions: Sequence[int]
) -> tuple[list[int], list[int]]:
    """Return what ``broadcast_in_dim`` makes of an array's shape, and which of its axes it then stretches."""
    lengths = [1] * len(shape)
    for axis, dimension in enumerate(dimensions):
        lengths[dimension] = array.shape[axis]
    return lengths, [axis for axis, length in enumerate(shape) if length != lengths[axis]]


@lazily
def _copies(array: Any, axis: int, times: int) -> Any:
    at = axis % array.ndim
    apart = lax.reshape(array, (*array.shape[: at + 1], 1, *array.shape[at + 1 :]))
    shape = (*array.shape[:at], array.shape[at] * times, *array.shape[at + 1 :])
    return lax.reshape(lax.concatenate([apart] * times, at + 1), shape)


@primitive_handler("convert_element_type")
def _convert(primitive, repeated: Repeated, *, new_dtype, **params):
    return repeated.over(lax.convert_element_type(repeated.array, new_dtype))


@primitive_handler(reshard_primitives())
def _reshard(primitive, repeated: Repeated, *, dst_sharding, **params):
    """Place the array itself; where the copies go to several devices, they are made first."""
    spec = (*dst_sharding.spec, *[None] * repeated.ndim)
    if spec[repeated.axis % repeated.ndim] is not None:
        return NotImplemented
    return repeated.over(primitive.bind(repeated.array, dst_sharding=dst_sharding, **params))


@primitive_handler(["mul", "div"])
def _scale(primitive, repeated: Repeated, factor: Operand, **params):
    if isinstance(factor, ImplicitArray) or jnp.ndim(factor):
        return NotImplemented
    return repeated.over(primitive.bind(repeated.array, factor, **params))


@primitive_handler("transpose")
def _transpose(primitive, repeated: Repeated, *, permutation, **params):
    axis = tuple(permutation).index(repeated.axis % repeated.ndim) - repeated.ndim
    return Repeated(lax.transpose(repeated.array, permutation), axis, repeated.times)


@primitive_handler("reshape")
def _reshape(primitive, repeated: Repeated, *rest, new_sizes, dimensions=None, **params):
    """Merge an axis that holds nothing but copies into the one before: (n, 1·times) becomes (n·times).

    The repeated axis keeps its number from the end. Other reshapes are left to the array.
    """
    at, shape = repeated.axis % repeated.ndim, repeated.shape
    merged = (*shape[: at - 1], shape[at - 1] * shape[at], *shape[at + 1 :])
    if dimensions is not None or at == 0 or repeated.array.shape[at] != 1 or tuple(new_sizes) != merged:
        return NotImplemented
    return Repeated(lax.squeeze(repeated.array, (at,)), repeated.axis, repeated.times)


@primitive_handler("dot_general", precedence=BEFORE_DEFERRED)
def _dot_left(primitive, lhs: Repeated, rhs: Operand, *, dimension_numbers, **params):
    (lhs_contract, rhs_contract), (lhs_batch, rhs_batch) = dimension_numbers
    swapped = (rhs_contract, lhs_contract), (rhs_batch, lhs_batch)
    out = _dot(rhs, lhs, swapped, params)
    if out is NotImplemented:
        return out
    return with_operands_swapped(out, len(rhs_batch), jnp.ndim(rhs) - len(rhs_contract))


@primitive_handler("dot_general", precedence=BEFORE_DEFERRED)
def _dot_right(primitive, lhs: Operand, rhs: Repeated, *, dimension_numbers, **params):
    return _dot(lhs, rhs, dimension_numbers, params)


@primitive_handler("dot_general", precedence=BEFORE_DEFERRED)
def _dot_both(primitive, lhs: Repeated, rhs: Repeated, *, dimension_numbers, **params):
    return NotImplemented


def _dot(other: Any, repeated: Repeated, numbers: Any, params: dict[str, Any]) -> Any:
    """The dot with groups of ``other`` beside each element of the array, where the axis is one of a batch."""
    (other_contract, contract), (other_batch, batch) = numbers
    at = repeated.axis % repeated.ndim
    if at not in batch or isinstance(other, ImplicitArray):
        return NotImplemented
    partner, times = other_batch[tuple(batch).index(at)], repeated.times
    count = repeated.array.shape[at]
    grouped = lax.reshape(other, (*other.shape[:partner], count, times, *other.shape[partner + 1 :]))

    def moved(axes: Any) -> tuple[int, ...]:
        return tuple(axis + (axis > partner) for axis in axes)

    inner = (moved(other_contract), contract), (moved(other_batch), batch)
    out = lax.dot_general(grouped, repeated.array, inner, **params)
    # The groups are now among the free axes of the other operand: back beside the batch axis they belong to.
    free = [axis for axis in range(grouped.ndim) if axis not in (*inner[0][0], *inner[1][0])]
    source, target = len(batch) + free.index(partner + 1), tuple(batch).index(at) + 1
    out = jnp.moveaxis(out, source, target)
    return lax.reshape(out, (*out.shape[: target - 1], count * times, *out.shape[target + 1 :]))
