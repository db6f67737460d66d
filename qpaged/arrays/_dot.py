"""dot_general on quantized operands: the scales fold into the result or into the other operand.

Along each axis of the quantized operand the scales are either one block, which is nothing to fold, or
several. Several along axes that the result keeps: the result is multiplied. Several along contracted axes
alone: the other operand is. Both at once (a scale per page and channel, or per group of channels), or so many
rows that the codes are fewer than what else would be multiplied: the codes are. Packed codes are contracted
place by place, so that they need not be interleaved.

On CPU, codes that are whole numbers meet a bfloat16 operand as such: see :mod:`qpaged.arrays._whole`.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from qpaged.arrays import _whole
from qpaged.arrays._bfloat16 import to_bfloat16
from qpaged.arrays._blocks import beside, blocked, refine
from qpaged.arrays._quantized import QuantizedArray, common_dtype
from qpaged.arrays._views import adjoint, factored, keeps_channels, places, stored

# What is decoded at once, if blocks are not longer: positions, and elements of all of them.
POSITIONS, ELEMENTS = 512, 2**19


class Axes(NamedTuple):
    """Which axes of two operands a dot contracts and which it batches over, pair by pair."""

    other_contract: tuple[int, ...]
    contract: tuple[int, ...]
    other_batch: tuple[int, ...]
    batch: tuple[int, ...]

    @property
    def numbers(self):
        return (self.other_contract, self.contract), (self.other_batch, self.batch)

    def kept(self, ndim: int) -> tuple[int, ...]:
        return tuple(axis for axis in range(ndim) if axis not in self.contract + self.batch)


def dot_general(lhs: Any, rhs: Any, dimension_numbers: Any, **params: Any) -> jax.Array:
    """``lax.dot_general`` where either operand, or both, may be a :class:`QuantizedArray`.

    The codes are contracted at the dtype of the other operand, summed and scaled in float32, and rounded
    once to the dtype of the program's result.
    """
    (lhs_contract, rhs_contract), (lhs_batch, rhs_batch) = (map(tuple, pair) for pair in dimension_numbers)
    if isinstance(rhs, QuantizedArray):
        other = lhs.materialize() if isinstance(lhs, QuantizedArray) else lhs
        return _dot(other, rhs, Axes(lhs_contract, rhs_contract, lhs_batch, rhs_batch), **params)
    out = _dot(rhs, lhs, Axes(rhs_contract, lhs_contract, rhs_batch, lhs_batch), **params)
    batch, free = len(lhs_batch), rhs.ndim - len(rhs_contract) - len(rhs_batch)
    # (batch, free of rhs, free of lhs) -> (batch, free of lhs, free of rhs)
    return lax.transpose(out, (*range(batch), *range(batch + free, out.ndim), *range(batch, batch + free)))


def _dot(other: jax.Array, array: QuantizedArray, axes: Axes, preferred_element_type=None, **params):
    result = preferred_element_type or common_dtype(other.dtype, array.dtype)
    channels = array.channel_axis % array.ndim
    turned = array.quantizer.transforms
    if array.scales is None or array.size == 0 or (turned and channels in axes.batch):
        return lax.dot_general(
            other, array.materialize(), axes.numbers, preferred_element_type=result, **params
        )
    if turned and channels in axes.contract:
        partner = axes.other_contract[axes.contract.index(channels)] - other.ndim
        other = adjoint(array.quantizer, other, partner)
    out = _in_pieces(other, factored(stored(array)), axes, params)
    if turned and channels not in axes.contract:
        kept = axes.kept(array.ndim)
        out = array.quantizer.inverse(out, kept.index(channels) - len(kept))
    return out.astype(result)


def _in_pieces(other: jax.Array, array: QuantizedArray, axes: Axes, params) -> jax.Array:
    """The dot in float32, a piece of the array's longest axis at a time: it is never decoded whole."""
    whole = array.channel_axis % array.ndim if keeps_channels(array) else None
    axis = max((a for a in range(array.ndim) if a != whole), key=lambda a: array.shape[a], default=None)
    if axis is None:
        return _by_place(other, array, axes, params)
    length, block = array.shape[axis], array.block[axis]
    most = min(POSITIONS, ELEMENTS * length // array.size)
    size = max(block, most // block * block)
    if length < 2 * size:
        return _by_place(other, array, axes, params)
    pairs = dict(zip(axes.contract + axes.batch, axes.other_contract + axes.other_batch, strict=True))
    kept = axes.kept(array.ndim)

    # Made anew for a gradient, which would keep all that was decoded.
    @functools.partial(jax.checkpoint, prevent_cse=False, static_argnums=2)
    def piece(start: Any, other: jax.Array, extent: int) -> jax.Array:
        cut = functools.partial(_cut, axis=axis, start=start, extent=extent, length=length)
        if axis in pairs:
            other = cut(other, axis=pairs[axis])
        return _by_place(other, array.like(cut(array.codes), *map(cut, array.parts)), axes, params)

    count, rest = divmod(length, size)
    starts = size * jnp.arange(count, dtype=jnp.int32)
    last = [piece(count * size, other, rest)] if rest else []
    if axis in axes.contract:
        first = piece(0, other, size)
        total, _ = lax.scan(lambda total, start: (total + piece(start, other, size), None), first, starts[1:])
        return functools.reduce(jnp.add, last, total)
    outs = lax.map(lambda start: piece(start, other, size), starts)
    at = axes.batch.index(axis) if axis in axes.batch else outs.ndim - 1 - len(kept) + kept.index(axis)
    outs = jnp.moveaxis(outs, 0, at)
    merged = outs.reshape(*outs.shape[:at], count * size, *outs.shape[at + 2 :])
    return lax.concatenate([merged, *last], at)


def _cut(part: jax.Array | None, axis: int, start: Any, extent: int, length: int) -> Any:
    """What a part of an array has of ``extent`` elements along an axis of ``length``, from ``start`` on."""
    if part is None or part.shape[axis] == 1:
        return part
    block = length // part.shape[axis]
    return lax.dynamic_slice_in_dim(part, start // block, extent // block, axis)


def _by_place(other: jax.Array, array: QuantizedArray, axes: Axes, params) -> jax.Array:
    """The dot in float32, of each place in a byte by itself where codes are packed."""
    channels, several = array.channel_axis % array.ndim, array.packing
    pieces = places(array)
    if pieces is None or channels in axes.batch:
        return _folded(other, array, axes, params)
    if channels in axes.contract:
        partner = axes.other_contract[axes.contract.index(channels)]
        parts = [lax.slice_in_dim(other, at, None, several, partner) for at in range(several)]
        sums = [_folded(part, piece, axes, params) for part, piece in zip(parts, pieces, strict=True)]
        return functools.reduce(jnp.add, sums)
    outs = [_folded(other, piece, axes, params) for piece in pieces]
    kept = axes.kept(array.ndim)
    at = outs[0].ndim - len(kept) + kept.index(channels)
    shape = outs[0].shape
    return jnp.stack(outs, at + 1).reshape(*shape[:at], shape[at] * several, *shape[at + 1 :])


def _folded(other: jax.Array, array: QuantizedArray, axes: Axes, params) -> jax.Array:
    """The dot in float32, for an array of float32 factors and, it may be, offsets."""
    several = [axis for axis, count in enumerate(array.scales.shape) if count > 1]
    contracted = [axis for axis in several if axis in axes.contract]
    kept = [axis for axis in several if axis in axes.kept(array.ndim)]
    if (contracted and kept) or _more_to_scale(other, array, axes, contracted + kept):
        out = _contract_scaled(other, array.like(array.codes, array.scales), axes, params)
    else:
        if other.dtype == jnp.bfloat16:
            array = _whole.whole(array)
        scale = _scale_other if contracted else _scale_result
        out = scale(other, array.like(array.codes, array.scales), axes, params)
    return out if array.offsets is None else out + _offset_term(other, array, axes)


def _more_to_scale(other: jax.Array, array: QuantizedArray, axes: Axes, several: Sequence[int]) -> bool:
    """Whether scaling each row of the other operand, or of the result, takes more than scaling the codes."""
    count = functools.partial(_count, array)
    rows = other.size // count(axes.contract + axes.batch)
    return rows * count(several) > count(axes.contract + axes.kept(array.ndim))


def _count(array: QuantizedArray, axes: Sequence[int]) -> int:
    return math.prod(array.shape[axis] for axis in axes)


def _contract_codes(other: jax.Array, array: QuantizedArray, axes: Axes, params) -> jax.Array:
    if isinstance(array.quantizer, _whole.Whole):
        return _whole.dot(other, array.codes, axes.numbers)
    values = array.values(other.dtype)
    return lax.dot_general(other, values, axes.numbers, preferred_element_type=jnp.float32, **params)


def _scale_result(other, array, axes: Axes, params) -> jax.Array:
    order = (*axes.batch, *axes.kept(array.ndim))
    factors = _spread(array.scales, array, order)
    factors = lax.transpose(factors, (*order, *axes.contract))
    factors = lax.squeeze(factors, range(len(order), array.ndim))
    free = other.ndim - len(axes.contract) - len(axes.batch)
    between = range(len(axes.batch), len(axes.batch) + free)
    return _contract_codes(other, array, axes, params) * lax.expand_dims(factors, between)


def _scale_other(other, array, axes: Axes, params) -> jax.Array:
    shared = axes.contract + axes.batch
    factors = _spread(array.scales, array, shared)
    factors = lax.squeeze(factors, axes.kept(array.ndim))
    places = dict(zip(shared, axes.other_contract + axes.other_batch, strict=True))
    at = [places[axis] for axis in sorted(shared)]
    factors = lax.transpose(factors, sorted(range(len(at)), key=at.__getitem__))
    factors = lax.expand_dims(factors, [axis for axis in range(other.ndim) if axis not in at])
    # Scaled, a float16 may leave its range; what it was made for, it still has in float32.
    dtype = jnp.float32 if other.dtype == jnp.float16 else other.dtype
    return _contract_codes((other.astype(jnp.float32) * factors).astype(dtype), array, axes, params)


def _contract_scaled(other: jax.Array, array: QuantizedArray, axes: Axes, params) -> jax.Array:
    """The codes are scaled, and rounded to the dtype of the other operand, before the dot."""
    values = blocked(array.values(jnp.float32), array.scales.shape) * beside(array.scales)
    dtype = jnp.float32 if other.dtype == jnp.float16 else other.dtype
    values = to_bfloat16(values) if dtype == jnp.bfloat16 else values.astype(dtype)
    other, values = other.astype(dtype), values.reshape(array.shape)
    return lax.dot_general(other, values, axes.numbers, preferred_element_type=jnp.float32, **params)


def _offset_term(other: jax.Array, array: QuantizedArray, axes: Axes) -> jax.Array:
    """What the offsets add: the other operand, summed over each block, against the block's offset."""
    summed = other.astype(jnp.float32)
    for axis, mine in zip(axes.other_contract, axes.contract, strict=True):
        count = array.offsets.shape[mine]
        pieces = (*summed.shape[:axis], count, array.block[mine], *summed.shape[axis + 1 :])
        summed = summed.reshape(pieces).sum(axis + 1)
    offsets = array.offsets
    for axis in axes.batch:
        offsets = refine(offsets, axis, array.block[axis])
    out = lax.dot_general(summed, offsets, axes.numbers, precision="highest")
    kept = axes.kept(array.ndim)
    for position, axis in enumerate(kept):
        out = refine(out, out.ndim - len(kept) + position, array.block[axis])
    return out


def _spread(scales: jax.Array, array: QuantizedArray, axes: Sequence[int]) -> jax.Array:
    """One scale for every element along those of ``axes`` that have several."""
    for axis in axes:
        if scales.shape[axis] > 1:
            scales = refine(scales, axis, array.block[axis])
    return scales
