"""Moves: reads that carry codes and scales together and decode nothing.

Each function means what the ``lax`` function of its name means, and counts axes from the front. Where a move
cuts through blocks, these are first refined: cut into smaller ones that repeat their scale. A function
returns None where the move cannot be made without decoding.
"""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax

from qpaged.arrays._blocks import block_shape, refine
from qpaged.arrays._indices import clip_to_int32
from qpaged.arrays._packing import stored_length
from qpaged.arrays._quantized import BlockParts, QuantizedArray
from qpaged.arrays._read_format import channels_matter, free_channels, unpack_codes

MovePart = Callable[[jax.Array, Sequence[int]], jax.Array]
"""The move of scales, given the extents of their blocks; of offsets and second-level scales, too."""


def moved(
    array: QuantizedArray, codes: jax.Array, move_part: MovePart, channels: int | None = None
) -> QuantizedArray:
    """Return the array whose codes have become ``codes``, and whose block parts go through ``move_part``.

    Args:
        channels: the axis of ``codes`` that the channels are on now; the same from the end as before, if
            None.
    """
    parts = array.parts.map(lambda part: move_part(part, block_shape(array.shape, part.shape)))
    channel_axis = array.channel_axis
    if channels is not None and channels_matter(array):
        channel_axis = channels - codes.ndim
    return array.like(codes, parts, channel_axis=channel_axis)


def codes_shape(array: QuantizedArray, shape: Sequence[int], channels: int | None = None) -> list[int]:
    """Return the shape of codes for a logical ``shape`` with channels on the axis ``channels``."""
    lengths = list(shape)
    axis = array.channels if channels is None else channels
    if channels_matter(array):
        lengths[axis] = stored_length(array.quantizer.bits, lengths[axis])
    return lengths


def transpose(array: QuantizedArray, permutation: Sequence[int]) -> QuantizedArray:
    channels = tuple(permutation).index(array.channels)
    codes = lax.transpose(array.codes, permutation)
    return moved(array, codes, lambda part, _: lax.transpose(part, permutation), channels)


def broadcast_in_dim(
    array: QuantizedArray, shape: Sequence[int], dimensions: Sequence[int]
) -> QuantizedArray | None:
    """Give new and stretched axes one block each, since what is repeated shares its scale."""
    channels = None
    if channels_matter(array):
        channels = dimensions[array.channels]
        if shape[channels] != array.shape[array.channels]:
            return None

    def broadcast_part(part: jax.Array, _: Sequence[int]) -> jax.Array:
        target = [1] * len(shape)
        for axis, dimension in enumerate(dimensions):
            target[dimension] = part.shape[axis]
        return lax.broadcast_in_dim(part, target, dimensions)

    codes = lax.broadcast_in_dim(array.codes, codes_shape(array, shape, channels), dimensions)
    return moved(array, codes, broadcast_part, channels)


def squeeze(array: QuantizedArray, dimensions: Sequence[int]) -> QuantizedArray:
    removed = {axis % array.ndim for axis in dimensions}
    channels = array.channels - sum(axis <= array.channels for axis in removed)
    codes = lax.squeeze(array.codes, dimensions)
    return moved(array, codes, lambda part, _: lax.squeeze(part, dimensions), channels)


def reverse(array: QuantizedArray, dimensions: Sequence[int]) -> QuantizedArray | None:
    """Reverse the array along axes; None along channels that share bytes or that a transform mixes.

    Blocks divide every axis evenly, so that their scales are reversed as the elements are.
    """
    if channels_matter(array) and array.channels in dimensions:
        return None
    return moved(array, lax.rev(array.codes, dimensions), lambda part, _: lax.rev(part, dimensions))


def slice_(
    array: QuantizedArray, start: Sequence[int], limit: Sequence[int], strides: Sequence[int] | None
) -> QuantizedArray | None:
    strides = (1,) * array.ndim if strides is None else tuple(strides)
    if channels_matter(array) and not _slices_whole_bytes(array, start, limit, strides):
        unpacked = free_channels(array)
        return None if unpacked is None else slice_(unpacked, start, limit, strides)

    def slice_part(part: jax.Array, block: Sequence[int]) -> jax.Array:
        for axis, extent in enumerate(block):
            part = _slice_scales(part, axis, extent, start[axis], limit[axis], strides[axis])
        return part

    codes = lax.slice(array.codes, codes_shape(array, start), codes_shape(array, limit), strides)
    return moved(array, codes, slice_part)


def _slices_whole_bytes(
    array: QuantizedArray, start: Sequence[int], limit: Sequence[int], strides: Sequence[int]
) -> bool:
    """Return True if a slice takes all the channels, or whole bytes of channels that can be cut apart."""
    channels = array.channels
    if (start[channels], limit[channels], strides[channels]) == (0, array.shape[channels], 1):
        return True
    if channels in array.whole_axes or strides[channels] != 1:
        return False
    return start[channels] % array.codes_per_byte == 0 and limit[channels] % array.codes_per_byte == 0


def _slice_scales(
    scales: jax.Array, axis: int, extent: int, start: int, limit: int, stride: int
) -> jax.Array:
    """Return the scales of the elements from ``start`` to ``limit`` along an axis of blocks of ``extent``."""
    if limit <= start:
        return lax.slice_in_dim(scales, 0, 0, axis=axis)
    inside_one_block = start // extent == (limit - 1) // extent
    if inside_one_block:
        return lax.slice_in_dim(scales, start // extent, start // extent + 1, axis=axis)
    fine_extent = math.gcd(extent, start, limit) if stride == 1 else 1
    fine = refine(scales, axis, extent // fine_extent)
    return lax.slice_in_dim(fine, start // fine_extent, limit // fine_extent, stride, axis)


def dynamic_slice(
    array: QuantizedArray, start: Sequence[jax.Array], sizes: Sequence[int]
) -> QuantizedArray | None:
    shape = array.shape
    if channels_matter(array) and sizes[array.channels] != shape[array.channels]:
        unpacked = free_channels(array)
        return None if unpacked is None else dynamic_slice(unpacked, start, sizes)
    start = clamp_start(start, shape, sizes)

    def slice_part(part: jax.Array, block: Sequence[int]) -> jax.Array:
        for axis, extent in enumerate(block):
            if sizes[axis] != shape[axis]:
                part = _dynamic_slice_scales(part, axis, extent, start[axis], sizes[axis])
        return part

    codes = lax.dynamic_slice(array.codes, start, codes_shape(array, sizes))
    return moved(array, codes, slice_part)


def _dynamic_slice_scales(
    scales: jax.Array, axis: int, extent: int, start: jax.Array, size: int
) -> jax.Array:
    """Return the scales of ``size`` elements from ``start`` on, along an axis of blocks of ``extent``."""
    count = scales.shape[axis]
    if size == 0:
        return lax.slice_in_dim(scales, 0, 0, axis=axis)
    if count == 1:
        return scales
    # Where the slice begins inside a block is known at run time only: so many blocks it may touch.
    touched = min(count, -(-(size - 1) // extent) + 1)
    first = jnp.minimum(start // extent, count - touched)
    scales = lax.dynamic_slice_in_dim(scales, first, touched, axis)
    if extent == 1:
        return scales
    fine = refine(scales, axis, extent)
    return lax.dynamic_slice_in_dim(fine, start - first * extent, size, axis)


def clamp_start(start: Sequence[jax.Array], shape: Sequence[int], sizes: Sequence[int]) -> list[jax.Array]:
    """Return start indices as ``lax.dynamic_slice`` clamps them, int32."""
    clamped = []
    for index, length, size in zip(start, shape, sizes, strict=True):
        clamped.append(jnp.clip(clip_to_int32(jnp.asarray(index)), 0, length - size))
    return clamped


def concatenate(arrays: Sequence[QuantizedArray], dimension: int) -> QuantizedArray | None:
    """Join arrays end to end; None along channels that a transform mixes or that share a global scale."""
    first = arrays[0]
    if dimension == first.channels:
        if first.quantizer.transform is not None or first.global_scale is not None:
            return None
        if first.channels in first.whole_axes:  # each array has planes, or a ring of states, of its own
            arrays = [unpack_codes(array) for array in arrays]
    return join(arrays, lambda parts: lax.concatenate(parts, dimension), first.channels)


def pad(array: QuantizedArray, padding: Sequence[tuple[int, int, int]]) -> QuantizedArray | None:
    """Pad with zeros, (low, high, between elements) along each axis; None unless it is at the ends of rows.

    Codes and scales of 0 read as 0, as those of an empty array do.
    """
    if channels_matter(array) and any(padding[array.channels]):
        return None
    if any(low < 0 or high < 0 or between for low, high, between in padding):
        return None

    def pad_part(part: jax.Array, block: Sequence[int]) -> jax.Array:
        in_blocks = []
        for axis, (low, high, _) in enumerate(padding):
            extent = math.gcd(block[axis], low, high)
            part = refine(part, axis, block[axis] // extent)
            in_blocks.append((low // extent, high // extent, 0))
        return lax.pad(part, jnp.zeros((), part.dtype), in_blocks)

    codes = lax.pad(array.codes, jnp.zeros((), array.codes.dtype), padding)
    return moved(array, codes, pad_part)


def tile(array: QuantizedArray, reps: Sequence[int]) -> QuantizedArray | None:
    tiled: QuantizedArray | None = array
    for axis, count in enumerate(reps):
        if tiled is not None and count > 1:
            tiled = concatenate([tiled] * count, axis)
    return tiled


def stack(arrays: Sequence[QuantizedArray], axis: int) -> QuantizedArray:
    channels = arrays[0].channels
    if axis <= channels:
        channels += 1
    return join(arrays, lambda parts: jnp.stack(parts, axis), channels)


def select(which: jax.Array, cases: Sequence[QuantizedArray]) -> QuantizedArray:
    """Return one of the cases, by a scalar predicate."""
    return join(cases, lambda parts: lax.select_n(which, *parts), cases[0].channels)


def join(
    arrays: Sequence[QuantizedArray], join: Callable[[list[jax.Array]], jax.Array], channels: int
) -> QuantizedArray:
    """Join the codes and the parts of arrays of one format, whose channels are then on ``channels``."""
    columns = zip(*(array.parts for array in arrays), strict=True)
    parts = [_join_parts(arrays, column, join) for column in columns]
    codes = join([array.codes for array in arrays])
    channel_axis = channels - codes.ndim if channels_matter(arrays[0]) else arrays[0].channel_axis
    return arrays[0].like(codes, BlockParts(*parts), channel_axis=channel_axis)


def _join_parts(
    arrays: Sequence[QuantizedArray],
    parts: Sequence[jax.Array | None],
    join: Callable[[list[jax.Array]], jax.Array],
) -> jax.Array | None:
    """Join scales on the blocks that all the arrays have in common; None where they have none."""
    blocks, there = [], []
    for array, part in zip(arrays, parts, strict=True):
        if part is None:
            return None
        blocks.append(block_shape(array.shape, part.shape))
        there.append(part)
    shared = [math.gcd(*extents) for extents in zip(*blocks, strict=True)]
    refined = [_refine_to(part, block, shared) for part, block in zip(there, blocks, strict=True)]
    return join(refined)


def _refine_to(scales: jax.Array, block: Sequence[int], smaller: Sequence[int]) -> jax.Array:
    for axis, (old, new) in enumerate(zip(block, smaller, strict=True)):
        scales = refine(scales, axis, old // new)
    return scales
