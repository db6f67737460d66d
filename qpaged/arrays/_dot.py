"""dot_general on quantized operands, a piece of the array at a time.

The scaling itself is in :mod:`qpaged.arrays._scaled_dot`. Here transforms are moved to the other operand or
to the result, the array is cut into pieces so that it is never decoded whole, and packed codes are contracted
one byte index at a time, so that they need not be interleaved.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from qpaged.arrays._dtypes import common_dtype
from qpaged.arrays._quantized import QuantizedArray
from qpaged.arrays._read_format import (
    channels_matter,
    split_bytes,
    transform_adjoint,
    untransformed,
    with_float_scales,
)
from qpaged.arrays._scaled_dot import DimensionNumbers, DotAxes, Params, scaled_dot, with_operands_swapped

# A piece has at most so many positions along the axis that is cut, and elements in all, unless one block has
# more. An array shorter than two pieces is not cut: a loop over one piece and a rest saves no memory.
MAX_POSITIONS = 512
MAX_ELEMENTS = 2**19


def dot_general(
    lhs: ArrayLike | QuantizedArray,
    rhs: ArrayLike | QuantizedArray,
    dimension_numbers: DimensionNumbers,
    *,
    preferred_element_type: Any = None,
    **params: Any,
) -> jax.Array:
    """Return ``lax.dot_general`` where either operand, or both, may be a :class:`QuantizedArray`.

    The codes are contracted at the dtype of the other operand, summed and scaled in float32, and rounded
    once to the dtype of the program's result. An array without scales, or one that is batched over
    transformed channels, is materialized first; so is the first of two quantized operands, since one is cut
    into pieces.
    """
    (lhs_contract, rhs_contract), (lhs_batch, rhs_batch) = dimension_numbers
    if isinstance(rhs, QuantizedArray):
        other = lhs.materialize() if isinstance(lhs, QuantizedArray) else jnp.asarray(lhs)
        axes = DotAxes.of(lhs_contract, rhs_contract, lhs_batch, rhs_batch)
        return _dot(other, rhs, axes, preferred_element_type, params)
    assert isinstance(lhs, QuantizedArray)
    other = jnp.asarray(rhs)
    axes = DotAxes.of(rhs_contract, lhs_contract, rhs_batch, lhs_batch)
    out = _dot(other, lhs, axes, preferred_element_type, params)
    return with_operands_swapped(out, len(rhs_batch), other.ndim - len(rhs_contract))


def _dot(
    other: jax.Array, array: QuantizedArray, axes: DotAxes, preferred_element_type: Any, params: Params
) -> jax.Array:
    """Return the dot of a plain operand and a quantized one, in that order.

    ``axes.contract`` and ``axes.batch`` are axes of ``array``, with the other's beside them.
    """
    dtype = preferred_element_type or common_dtype(other.dtype, array.dtype)
    transform, channels = array.quantizer.transform, array.channels
    batches_over_transformed = transform is not None and channels in axes.batch
    if array.scales is None or array.size == 0 or batches_over_transformed:
        dense = array.materialize()
        return lax.dot_general(other, dense, axes.numbers, preferred_element_type=dtype, **params)
    if transform is not None and channels in axes.contract:
        other_channels = axes.other_contract[axes.contract.index(channels)]
        other = transform_adjoint(transform, other, other_channels - other.ndim)
    out = _dot_in_pieces(other, with_float_scales(untransformed(array)), axes, params)
    if transform is not None and channels not in axes.contract:
        kept = axes.kept(array.ndim)
        out = transform.inverse(out, kept.index(channels) - len(kept))
    return out.astype(dtype)


def _dot_in_pieces(other: jax.Array, array: QuantizedArray, axes: DotAxes, params: Params) -> jax.Array:
    """Return the dot in float32, made of pieces of the array's longest axis: it is never decoded whole."""
    axis = _longest_axis(array)
    if axis is None:
        return _dot_by_byte_index(other, array, axes, params)
    length = array.shape[axis]
    piece_length = _piece_length(array, axis)
    if length < 2 * piece_length:
        return _dot_by_byte_index(other, array, axes, params)

    def dot_piece(start: int | jax.Array, other_piece: jax.Array, extent: int) -> jax.Array:
        return _dot_by_byte_index(other_piece, _slice_array(array, axis, start, extent), axes, params)

    return dot_in_pieces(other, axes, Cut(array.ndim, axis, length, piece_length), dot_piece)


class Cut(NamedTuple):
    """How an operand of ``ndim`` axes is cut: along ``axis``, into pieces of ``piece_length`` and a rest."""

    ndim: int
    axis: int
    length: int
    piece_length: int


def dot_in_pieces(
    other: jax.Array,
    axes: DotAxes,
    cut: Cut,
    dot_of_piece: Callable[[int | jax.Array, jax.Array, int], jax.Array],
) -> jax.Array:
    """Return a dot of a plain operand and one that is cut: added up, or joined, from the dots of its pieces.

    Args:
        other: the plain operand.
        axes: of the dot.
        cut: into two pieces or more.
        dot_of_piece: takes where a piece starts, what of ``other`` meets it, and how long it is; returns a
            float32 dot with the same axes.
    """
    axis = cut.axis

    # Recomputed for a gradient, which would otherwise keep all that was decoded. The other operand is an
    # argument, so that what is made of it is recomputed, too.
    @functools.partial(jax.checkpoint, prevent_cse=False, static_argnums=2)
    def dot_piece(start: int | jax.Array, other: jax.Array, extent: int) -> jax.Array:
        return dot_of_piece(start, _slice_other(other, axes, axis, start, extent), extent)

    count, rest = divmod(cut.length, cut.piece_length)
    starts = cut.piece_length * jnp.arange(count, dtype=jnp.int32)
    last = dot_piece(count * cut.piece_length, other, rest) if rest else None
    if axis in axes.contract:
        # The first piece is summed outside of the scan, whose carry must have its shape.
        first = dot_piece(0, other, cut.piece_length)

        def add_piece(total: jax.Array, start: jax.Array) -> tuple[jax.Array, None]:
            return total + dot_piece(start, other, cut.piece_length), None

        total, _ = lax.scan(add_piece, first, starts[1:])
        return total if last is None else total + last
    outs = lax.map(lambda start: dot_piece(start, other, cut.piece_length), starts)
    return _join_pieces(outs, last, axes, axis, cut.ndim)


def _longest_axis(array: QuantizedArray) -> int | None:
    """Return the longest axis along which an array can be cut: not the channels if packed or transformed.

    Nor an axis whose length is a symbol, as in a program that is exported for any batch.
    """
    candidates = []
    for axis, length in enumerate(array.shape):
        is_cut = not (channels_matter(array) and axis == array.channels)
        if is_cut and isinstance(length, int):
            candidates.append(axis)
    return max(candidates, key=lambda axis: array.shape[axis], default=None)


def _piece_length(array: QuantizedArray, axis: int) -> int:
    """Return how long pieces along ``axis`` are: whole blocks, and few enough elements."""
    extent = array.block[axis]
    return max(extent, length_of_pieces(array.shape, axis) // extent * extent)


def length_of_pieces(shape: Sequence[int], axis: int) -> int:
    """Return how long pieces along ``axis`` may be, for few enough elements."""
    known_size = math.prod(length for length in shape if isinstance(length, int))
    return max(1, min(MAX_POSITIONS, MAX_ELEMENTS * shape[axis] // known_size))


def _slice_other(
    other: jax.Array, axes: DotAxes, axis: int, start: int | jax.Array, extent: int
) -> jax.Array:
    """Return what of the other operand meets a piece of the array along ``axis``."""
    partners = dict(zip(axes.contract + axes.batch, axes.other_contract + axes.other_batch, strict=True))
    if axis not in partners:
        return other
    return lax.dynamic_slice_in_dim(other, start, extent, partners[axis])


def _slice_array(array: QuantizedArray, axis: int, start: int | jax.Array, extent: int) -> QuantizedArray:
    """Return ``extent`` elements of the array along ``axis``, whole blocks of it, from ``start`` on."""
    length = array.shape[axis]

    def slice_part(part: jax.Array) -> jax.Array:
        if part.shape[axis] == 1:  # one scale for the whole axis, and so for every piece
            return part
        positions_per_entry = length // part.shape[axis]
        first, count = start // positions_per_entry, extent // positions_per_entry
        return lax.dynamic_slice_in_dim(part, first, count, axis)

    return array.like(slice_part(array.codes), array.parts.map(slice_part))


def _join_pieces(
    outs: jax.Array,  # [pieces, *batch, *kept of other, *kept of array]
    last: jax.Array | None,  # [*batch, *kept of other, *kept of array], of a shorter piece
    axes: DotAxes,
    axis: int,
    ndim: int,
) -> jax.Array:
    """Return the results of pieces along ``axis`` of the array, joined along that axis."""
    kept = axes.kept(ndim)
    if axis in axes.batch:
        joined_axis = axes.batch.index(axis)
    else:
        joined_axis = outs.ndim - 1 - len(kept) + kept.index(axis)
    outs = jnp.moveaxis(outs, 0, joined_axis)
    pieces, piece_length = outs.shape[joined_axis : joined_axis + 2]
    shape = (*outs.shape[:joined_axis], pieces * piece_length, *outs.shape[joined_axis + 2 :])
    parts = [outs.reshape(shape)]
    if last is not None:
        parts.append(last)
    return lax.concatenate(parts, joined_axis)


def _dot_by_byte_index(other: jax.Array, array: QuantizedArray, axes: DotAxes, params: Params) -> jax.Array:
    """Return the dot in float32; where codes are packed, of each byte index by itself."""
    channels, codes_per_byte = array.channels, array.codes_per_byte
    pieces = split_bytes(array)
    if pieces is None or channels in axes.batch:
        return scaled_dot(other, array, axes, params)
    if channels in axes.contract:
        other_channels = axes.other_contract[axes.contract.index(channels)]
        total = None
        for byte_index, piece in enumerate(pieces):
            other_piece = lax.slice_in_dim(other, byte_index, None, codes_per_byte, other_channels)
            partial_sum = scaled_dot(other_piece, piece, axes, params)
            total = partial_sum if total is None else total + partial_sum
        assert total is not None
        return total
    outs = [scaled_dot(other, piece, axes, params) for piece in pieces]
    return _interleave(outs, axes, channels, array.ndim)


def _interleave(outs: list[jax.Array], axes: DotAxes, channels: int, ndim: int) -> jax.Array:
    """Interleave the results of the byte indices: channel c comes from number c mod len(outs)."""
    kept = axes.kept(ndim)
    out_channels = outs[0].ndim - len(kept) + kept.index(channels)
    shape = list(outs[0].shape)
    shape[out_channels] *= len(outs)
    return jnp.stack(outs, out_channels + 1).reshape(shape)
