"""Writes by arithmetic over a whole axis: a row selected, cleared or added where a one-hot mask says.

What a program shows of its operands tells these from other arithmetic. Each function returns None where it
does not, or where the format cannot be written to in such rows.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax

from qpaged.arrays._rows import CacheArray, add_rows, may_put_rows, put_rows
from qpaged.implicit import ImplicitArray
from qpaged.implicit._facts import Kind
from qpaged.implicit._origins import fact_of, one_hot_of, unstretched

Operand: TypeAlias = jax.Array | ImplicitArray
Put: TypeAlias = Callable[
    [CacheArray, Sequence[int], Sequence[jax.Array], jax.Array], CacheArray
]  # put_rows or add_rows


class RowMask(NamedTuple):
    """Which row a value is about.

    Attributes:
        one_hot: bool; 1 long along each axis that it repeats itself along.
        axis: the axis along which it is True at one index at most.
    """

    one_hot: jax.Array
    axis: int


class Targets(NamedTuple):
    """Where rows go: the indexed axes, ascending, and (rows,) int32 coordinates along each of them."""

    axes: tuple[int, ...]
    coordinates: list[jax.Array]


def select(which: jax.Array, cases: Sequence[Operand]) -> CacheArray | None:
    """Return ``lax.select_n`` of a quantized array and a plain one of which no more than a row is chosen."""
    if len(cases) != 2:
        return None
    for kind, (array, new) in ((Kind.ONE_HOT, cases), (Kind.ALL_BUT_ONE, cases[::-1])):
        if isinstance(array, CacheArray) and not isinstance(new, ImplicitArray):
            mask = _row_mask(array, which, kind)
            if mask is not None:
                return _put(array, mask, unstretched(new))
    return None


def add(array: CacheArray, row: Operand) -> CacheArray | None:
    """Return ``array + row``, for a row that is zero but at one index of an axis."""
    mask = _row_mask(array, row, Kind.ROW)
    if mask is None or isinstance(row, ImplicitArray):
        return None
    return _put(array, mask, row, add_rows)


def multiply(array: CacheArray, factor: Operand) -> CacheArray | None:
    """Return ``array * factor``, for a factor that is 0 at one index of an axis, and 1 at the others."""
    mask = _row_mask(array, factor, Kind.ALL_BUT_ONE)
    return None if mask is None else _put(array, mask, jnp.zeros((1,) * array.ndim, array.dtype))


def _row_mask(array: CacheArray, operand: Operand, kind: Kind) -> RowMask | None:
    """Return the row of an array that an operand is about, if the program shows it to be of a kind."""
    fact = fact_of(operand)
    if fact is None or fact.kind is not kind or operand.shape[fact.axis] != array.shape[fact.axis]:
        return None  # also where a mask of one index is stretched to all of them
    if kind is Kind.ALL_BUT_ONE:
        return RowMask(~unstretched(operand).astype(bool), fact.axis)
    one_hot = one_hot_of(operand)
    return None if one_hot is None else RowMask(one_hot.astype(bool), fact.axis)


def _put(array: CacheArray, mask: RowMask, values: jax.Array, put: Put = put_rows) -> CacheArray | None:
    """Return ``array`` with rows of ``values`` put where a mask is True; values may be 1 long along axes.

    None for rows that part blocks along other axes, which are computed as a whole.
    """
    if array.size == 0:
        return array
    targets = _targets(array, mask)
    cuts_blocks = any(array.block[other] > 1 for other in targets.axes if other != mask.axis)
    if cuts_blocks or not may_put_rows(array, targets.axes):
        return None
    return put(array, *targets, _rows(array, mask, values))


def _targets(array: CacheArray, mask: RowMask) -> Targets:
    """Return the coordinates at which a mask is True, those past the end where it is nowhere."""
    one_hot, axis = mask
    along = jnp.argmax(one_hot, axis).astype(jnp.int32)
    along = jnp.where(one_hot.any(axis), along, array.shape[axis])
    grid = tuple(length for other, length in enumerate(one_hot.shape) if other != axis and length != 1)
    axes = tuple(other for other, length in enumerate(one_hot.shape) if other == axis or length != 1)
    coordinates = [
        lax.broadcasted_iota(jnp.int32, grid, position).reshape(-1) for position in range(len(grid))
    ]
    coordinates.insert(axes.index(axis), along.reshape(-1))
    return Targets(axes, coordinates)


def _rows(array: CacheArray, mask: RowMask, values: jax.Array) -> jax.Array:
    """Return what ``values`` are where a mask is True: (rows, *extents of the other axes in order)."""
    one_hot, axis = mask
    if values.shape[axis] != 1:
        values = jnp.where(one_hot, values, jnp.zeros((), values.dtype)).sum(axis, keepdims=True)
    shape = [1 if other == axis else length for other, length in enumerate(array.shape)]
    values = jnp.broadcast_to(values, shape).squeeze(axis)
    varying = [other for other, length in enumerate(one_hot.shape) if other != axis and length != 1]
    first = [other - (other > axis) for other in varying]
    values = jnp.moveaxis(values, first, range(len(first)))
    return values.reshape(-1, *values.shape[len(first) :])
