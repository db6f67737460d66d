"""Moves: reads that carry codes and scales together and decode nothing.

Each function means what the ``lax`` function of its name means. Where a move cuts through blocks, these are
first refined: cut into smaller ones that repeat their scale.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from qpaged.arrays._blocks import block_shape, refine
from qpaged.arrays._folds import unfold
from qpaged.arrays._indices import clipped
from qpaged.arrays._quantized import QuantizedArray
from qpaged.arrays._views import cut_channels, keeps_channels, one_an_element, past_end

Change = Callable[[jax.Array, Sequence[int]], jax.Array]
"""What a move does to scales, given the extents of their blocks."""


def move(
    array: QuantizedArray, codes: Any, change: Change, channel_axis: int | None = None
) -> QuantizedArray:
    """The array whose codes have become ``codes``, and whose scales of all kinds go through ``change``.

    Args:
        channel_axis: where the channels are now, counted from the end; where they were, if None.
    """
    scales, offsets, outer = (
        None if part is None else change(part, block_shape(array.shape, part.shape)) for part in array.parts
    )
    if channel_axis is None or not keeps_channels(array):
        channel_axis = array.channel_axis
    return array.like(codes, scales, offsets, outer, channel_axis=channel_axis)


def physical(array: QuantizedArray, shape: Sequence[int], channel_axis: int | None = None) -> list[int]:
    """The shape of codes for a logical ``shape`` with channels on ``channel_axis``."""
    lengths = list(shape)
    if array.packing > 1:
        lengths[array.channel_axis if channel_axis is None else channel_axis] //= array.packing
    return lengths


def transpose(array: QuantizedArray, permutation: Sequence[int]) -> QuantizedArray:
    channels = tuple(permutation).index(array.channel_axis % array.ndim) - array.ndim
    codes = lax.transpose(array.codes, permutation)
    return move(array, codes, lambda s, _: lax.transpose(s, permutation), channels)


def broadcast_in_dim(
    array: QuantizedArray, shape: Sequence[int], dims: Sequence[int]
) -> QuantizedArray | None:
    """New and stretched axes have one block: what is repeated shares its scale."""
    channels = -1
    if keeps_channels(array):
        channels = dims[array.channel_axis] - len(shape)
        if shape[channels] != array.shape[array.channel_axis]:
            return None

    def spread(scales, _):
        target = [1] * len(shape)
        for axis, dim in enumerate(dims):
            target[dim] = scales.shape[axis]
        return lax.broadcast_in_dim(scales, target, dims)

    codes = lax.broadcast_in_dim(array.codes, physical(array, shape, channels), dims)
    return move(array, codes, spread, channels)


def reshape(array: QuantizedArray, shape: Sequence[int]) -> QuantizedArray | None:
    """Split and merge axes; blocks that do not tile the new axes are refined until they do."""
    before, shape = array.shape, tuple(shape)
    if array.size == 0:
        codes = array.unpacked().reshape(shape)
        return move(one_an_element(array), codes, lambda s, _: jnp.zeros(shape, s.dtype))
    channels = _channels_after(array, shape) if keeps_channels(array) else -1
    if channels is None:
        view = cut_channels(array)
        return None if view is None else reshape(view, shape)

    def regroup(scales, block):
        counts = [0] * len(shape)
        for old, new in _groups(before, shape):
            old_block, new_block = _common(
                [before[a] for a in old], [block[a] for a in old], [shape[a] for a in new]
            )
            for axis, b in zip(old, old_block, strict=True):
                scales = refine(scales, axis, block[axis] // b)
            for axis, b in zip(new, new_block, strict=True):
                counts[axis] = shape[axis] // b
        return scales.reshape(counts)

    return move(array, array.codes.reshape(physical(array, shape, channels)), regroup, channels)


def _channels_after(array: QuantizedArray, shape: Sequence[int]) -> int | None:
    """Where a reshape puts the channels, counted from the end; None where it takes them apart.

    Packed codes stay together where the channels come last of what is merged or split, and the new last axis
    is of whole bytes; a transform needs them all, and no others, on one axis.
    """
    channels = array.channel_axis % array.ndim
    for old, new in _groups(array.shape, shape):
        if channels in old:
            old = [axis for axis in old if array.shape[axis] > 1]
            new = [axis for axis in new if shape[axis] > 1]
            if not old or not new or old[-1] != channels:
                return None
            length = shape[new[-1]]
            alone = length == array.shape[channels] or not array.quantizer.transforms
            return new[-1] - len(shape) if alone and length % array.packing == 0 else None
    return None


def _groups(before: Sequence[int], after: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """The shortest runs of old and new axes that hold the same elements."""
    groups = []
    i = j = 0
    while i < len(before) or j < len(after):
        old, new = [i] if i < len(before) else [], [j] if j < len(after) else []
        while math.prod(before[a] for a in old) != math.prod(after[a] for a in new):
            if math.prod(before[a] for a in old) < math.prod(after[a] for a in new):
                old.append(i + len(old))
            else:
                new.append(j + len(new))
        groups.append((old, new))
        i, j = i + len(old), j + len(new)
    return groups


def _run(lengths: Sequence[int], block: Sequence[int]) -> int:
    """Length of the runs of flattened elements that surely share a scale."""
    run = 1
    for length, b in zip(reversed(lengths), reversed(block), strict=True):
        run *= b
        if b != length:
            break
    return run


def _split(lengths: Sequence[int], run: int) -> list[int]:
    """Blocks of the new axes: the largest that the run allows, from the last axis on."""
    block: list[int] = []
    for length in reversed(lengths):
        b = math.gcd(run, length)
        block.insert(0, b)
        run = run // b if b == length else 1
    return block


def _common(old: Sequence[int], block: Sequence[int], new: Sequence[int]) -> tuple[list[int], list[int]]:
    """Blocks of the old and of the new axes that cut the flattened elements into the same runs."""
    run = _run(old, block)
    while True:
        new_block = _split(new, run)
        old_block = _split(old, math.prod(new_block))
        run = math.prod(old_block)
        if run == math.prod(new_block):
            return old_block, new_block


def squeeze(array: QuantizedArray, dimensions: Sequence[int]) -> QuantizedArray:
    gone = {axis % array.ndim for axis in dimensions}
    channels = -1 - sum(axis not in gone for axis in range(array.channel_axis % array.ndim + 1, array.ndim))
    codes = lax.squeeze(array.codes, dimensions)
    return move(array, codes, lambda s, _: lax.squeeze(s, dimensions), channels)


def slice_(
    array: QuantizedArray, start: Sequence[int], limit: Sequence[int], strides: Any
) -> QuantizedArray | None:
    strides = (1,) * array.ndim if strides is None else tuple(strides)
    channels = array.channel_axis
    if keeps_channels(array) and (start[channels], limit[channels], strides[channels]) != (
        0,
        array.shape[channels],
        1,
    ):
        aligned = start[channels] % array.packing == limit[channels] % array.packing == 0
        if array.quantizer.transforms or not (aligned and strides[channels] == 1):
            view = cut_channels(array)
            return None if view is None else slice_(view, start, limit, strides)

    def cut(scales, block):
        for axis, window in enumerate(zip(block, start, limit, strides, strict=True)):
            scales = _slice_scales(scales, axis, *window)
        return scales

    first, last = physical(array, start), physical(array, limit)
    return move(array, lax.slice(array.codes, first, last, strides), cut)


def split(array: QuantizedArray, sizes: Sequence[int], axis: int) -> list[QuantizedArray] | None:
    """Slices along ``axis``, one after another; None where it may not be cut."""
    pieces, low = [], 0
    for size in sizes:
        start = [low if a == axis else 0 for a in range(array.ndim)]
        limit = [low + size if a == axis else length for a, length in enumerate(array.shape)]
        piece = slice_(array, start, limit, None)
        if piece is None:
            return None
        pieces.append(piece)
        low += size
    return pieces


def _slice_scales(scales: jax.Array, axis: int, block: int, low: int, high: int, stride: int) -> jax.Array:
    if high <= low:
        return lax.slice_in_dim(scales, 0, 0, axis=axis)
    if low // block == (high - 1) // block:  # inside one block
        return lax.slice_in_dim(scales, low // block, low // block + 1, axis=axis)
    kept = math.gcd(block, low, high) if stride == 1 else 1
    fine = refine(scales, axis, block // kept)
    return lax.slice_in_dim(fine, low // kept, high // kept, stride, axis)


def dynamic_slice(array: QuantizedArray, start: Sequence[Any], sizes: Sequence[int]) -> QuantizedArray | None:
    shape = array.shape
    if keeps_channels(array) and sizes[array.channel_axis] != shape[array.channel_axis]:
        view = cut_channels(array)
        return None if view is None else dynamic_slice(view, start, sizes)
    start = clamped(start, shape, sizes)

    def cut(scales, block):
        for axis, (b, at, size) in enumerate(zip(block, start, sizes, strict=True)):
            count = scales.shape[axis]
            if size == 0:
                scales = lax.slice_in_dim(scales, 0, 0, axis=axis)
            if size == 0 or count == 1 or size == shape[axis]:
                continue
            touched = min(count, -(-(size - 1) // b) + 1)
            first = jnp.minimum(at // b, count - touched)
            scales = lax.dynamic_slice_in_dim(scales, first, touched, axis)
            if b > 1:
                fine = refine(scales, axis, b)
                scales = lax.dynamic_slice_in_dim(fine, at - first * b, size, axis)
        return scales

    return move(array, lax.dynamic_slice(array.codes, start, physical(array, sizes)), cut)


def clamped(start: Sequence[Any], shape: Sequence[int], sizes: Sequence[int]) -> list[jax.Array]:
    """Start indices as ``lax.dynamic_slice`` clamps them, int32."""
    limits = [length - size for length, size in zip(shape, sizes, strict=True)]
    return [jnp.clip(clipped(jnp.asarray(at)), 0, top) for at, top in zip(start, limits, strict=True)]


def concatenate(arrays: Sequence[QuantizedArray], dimension: int) -> QuantizedArray | None:
    """Arrays of one format, end to end; None if that would add channels to others."""
    array = arrays[0]
    if dimension == array.channel_axis % array.ndim and (
        array.quantizer.transforms or array.outer is not None
    ):
        return None
    return _join(arrays, lambda parts: lax.concatenate(parts, dimension))


def tile(array: QuantizedArray, reps: Sequence[int]) -> QuantizedArray | None:
    """Copies end to end, so many along each axis; None if that would add channels to others."""
    tiled: QuantizedArray | None = array
    for axis, times in enumerate(reps):
        if tiled is not None and times > 1:
            tiled = concatenate([tiled] * times, axis)
    return tiled


def stack(arrays: Sequence[QuantizedArray], axis: int) -> QuantizedArray:
    """Arrays of one format, side by side along a new axis."""
    array = arrays[0]
    after = axis > array.channel_axis % array.ndim  # the new axis comes behind the channels
    return _join(arrays, lambda parts: jnp.stack(parts, axis), array.channel_axis - after)


def unstack(array: QuantizedArray, axis: int) -> list[QuantizedArray] | None:
    """The slices along ``axis``, without it; None along the channels of a format that keeps them together."""
    if keeps_channels(array) and axis == array.channel_axis % array.ndim:
        view = cut_channels(array)
        return None if view is None else unstack(view, axis)
    sizes = [length if a != axis else 1 for a, length in enumerate(array.shape)]

    def at(index):
        start = [0 if a != axis else index for a in range(array.ndim)]
        return slice_(array, start, [s + n for s, n in zip(start, sizes, strict=True)], None)

    pieces = [at(index) for index in range(array.shape[axis])]
    return [squeeze(piece, (axis,)) for piece in pieces if piece is not None]


def select(which: jax.Array, cases: Sequence[QuantizedArray]) -> QuantizedArray:
    """One of the cases, by a scalar predicate."""
    return _join(cases, lambda parts: lax.select_n(which, *parts))


def _join(
    arrays: Sequence[QuantizedArray], joined: Callable[[list], jax.Array], channel_axis: int | None = None
) -> QuantizedArray:
    def common(parts):
        """The scales of all, on the blocks that all have in common."""
        if parts[0] is None:
            return None
        blocks = [block_shape(a.shape, part.shape) for a, part in zip(arrays, parts, strict=True)]
        shared = [math.gcd(*extents) for extents in zip(*blocks, strict=True)]
        return joined([_refined(part, b, shared) for part, b in zip(parts, blocks, strict=True)])

    scales, offsets, outer = (common([getattr(a, n) for a in arrays]) for n in ("scales", "offsets", "outer"))
    codes = joined([a.codes for a in arrays])
    if channel_axis is None or not keeps_channels(arrays[0]):
        channel_axis = arrays[0].channel_axis
    return arrays[0].like(codes, scales, offsets, outer, channel_axis=channel_axis)


def _refined(scales: jax.Array, block: Sequence[int], smaller: Sequence[int]) -> jax.Array:
    for axis, (old, new) in enumerate(zip(block, smaller, strict=True)):
        scales = refine(scales, axis, old // new)
    return scales


def gather(
    array: QuantizedArray, index: jax.Array, numbers: Any, sizes: Sequence[int], mode: Any, fill_value: Any
) -> QuantizedArray | None:
    """``lax.gather``; None where a window cuts through blocks at places known only at run time.

    What is read past the end is NaN, or 0 where ``fill_value`` is, as from a plain array.
    """
    channels = array.channel_axis % array.ndim
    if keeps_channels(array) and sizes[channels] != array.shape[channels]:
        view = cut_channels(array)
        return None if view is None else gather(view, index, numbers, sizes, mode, fill_value)
    to_nan = fill_value is None or np.isnan(fill_value)
    if not (to_nan or fill_value == 0) or not _windows_fit(array, numbers, sizes):
        return None
    fill = past_end(array) if to_nan else (0, 0)
    if fill is None:
        return None
    code_fill, scale_fill = fill
    if array.folds > 1 and _takes_pages(array, index, numbers, sizes):  # a TPU moves no more than these
        extents = [*sizes[:-2], *array.folded.shape[-2:]]
        rows = lax.gather(array.folded, index, numbers, extents, mode=mode, fill_value=code_fill)
        codes = unfold(rows, array.folds)
    else:
        extents = physical(array, sizes)
        codes = lax.gather(array.codes, index, numbers, extents, mode=mode, fill_value=code_fill)

    def read(scales, block):
        extents = [
            count if size == length else min(size, count)
            for size, length, count in zip(sizes, array.shape, scales.shape, strict=True)
        ]
        blocks = _block_index(array.shape, block, index, numbers.start_index_map, sizes, mode)
        return lax.gather(scales, blocks, numbers, extents, mode=mode, fill_value=scale_fill)

    return move(array, codes, read, _channels_gathered(array, numbers, codes.ndim))


def _takes_pages(array: QuantizedArray, index: jax.Array, numbers: Any, sizes: Sequence[int]) -> bool:
    """Whether slots and channels, the last two axes, are read whole and come out last."""
    batched = getattr(numbers, "operand_batching_dims", ())
    named = {*numbers.collapsed_slice_dims, *numbers.start_index_map, *batched}
    ndim = len(numbers.offset_dims) + index.ndim - 1
    whole = tuple(sizes[-2:]) == array.shape[-2:] and named.isdisjoint((array.ndim - 2, array.ndim - 1))
    return whole and tuple(numbers.offset_dims[-2:]) == (ndim - 2, ndim - 1)


def _windows_fit(array: QuantizedArray, numbers: Any, sizes: Sequence[int]) -> bool:
    """Whether every window is of whole blocks, or inside one, wherever it lies."""
    batched = getattr(numbers, "operand_batching_dims", ())
    return all(
        count == length or (axis not in batched and (count == 1 or size in (1, length)))
        for part in (array.scales, array.outer)
        if part is not None
        for axis, (size, length, count) in enumerate(zip(sizes, array.shape, part.shape, strict=True))
    )


def _channels_gathered(array: QuantizedArray, numbers: Any, ndim: int) -> int:
    """Where a gather of whole channels puts them, counted from the end."""
    gone = (*numbers.collapsed_slice_dims, *getattr(numbers, "operand_batching_dims", ()))
    windows = [axis for axis in range(array.ndim) if axis not in gone]
    channels = array.channel_axis % array.ndim
    return numbers.offset_dims[windows.index(channels)] - ndim if channels in windows else -1


def _block_index(
    shape: Sequence[int], block: Sequence[int], index: jax.Array, axes: Sequence[int], sizes, mode
) -> jax.Array:
    """Indices of blocks for indices of elements, past the end where those are."""
    index = clipped(index)
    tops = jnp.array([shape[axis] - sizes[axis] for axis in axes], jnp.int32)
    if mode == lax.GatherScatterMode.CLIP:
        index = jnp.clip(index, 0, tops)
    blocks = index // jnp.array([block[axis] for axis in axes], jnp.int32)
    past = jnp.array([shape[axis] for axis in axes], jnp.int32)
    return jnp.where((index >= 0) & (index <= tops), blocks, past)
