"""Reshapes of quantized arrays, which refine blocks until these tile the new axes."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from qpaged.arrays._blocks import refine
from qpaged.arrays._moves import codes_shape, moved
from qpaged.arrays._quantized import QuantizedArray
from qpaged.arrays._read_format import channels_matter, free_channels, unpack_codes


def reshape(array: QuantizedArray, shape: Sequence[int]) -> QuantizedArray | None:
    """Return ``array`` in another shape; None where that takes apart channels that a transform mixes."""
    shape = tuple(shape)
    if array.size == 0:
        codes = array.unpacked().reshape(shape)
        return moved(unpack_codes(array), codes, lambda part, _: jnp.zeros(shape, part.dtype))
    if not channels_matter(array):
        return _reshape_parts(array, shape, None)
    channels = _channels_after(array, shape)
    if channels is not None:
        return _reshape_parts(array, shape, channels)
    unpacked = free_channels(array)
    return None if unpacked is None else reshape(unpacked, shape)


def _reshape_parts(array: QuantizedArray, shape: tuple[int, ...], channels: int | None) -> QuantizedArray:
    before = array.shape

    def reshape_scales(scales: jax.Array, block: Sequence[int]) -> jax.Array:
        counts = [0] * len(shape)
        for old_axes, new_axes in axis_groups(before, shape):
            old_block, new_block = _common_blocks(
                [before[axis] for axis in old_axes],
                [block[axis] for axis in old_axes],
                [shape[axis] for axis in new_axes],
            )
            for axis, extent in zip(old_axes, old_block, strict=True):
                scales = refine(scales, axis, block[axis] // extent)
            for axis, extent in zip(new_axes, new_block, strict=True):
                counts[axis] = shape[axis] // extent
        return scales.reshape(counts)

    codes = array.codes.reshape(codes_shape(array, shape, channels))
    return moved(array, codes, reshape_scales, channels)


def _channels_after(array: QuantizedArray, shape: Sequence[int]) -> int | None:
    """Return the axis that a reshape puts the channels on; None where it takes them apart.

    Packed codes stay together where the channels come last of what is merged or split, and the new last axis
    is of whole bytes. A transform, and codes in two planes, need all the channels, and no other
    elements, on one axis.
    """
    for old_axes, new_axes in axis_groups(array.shape, shape):
        if array.channels not in old_axes:
            continue
        old_axes = [axis for axis in old_axes if array.shape[axis] > 1]
        new_axes = [axis for axis in new_axes if shape[axis] > 1]
        if not old_axes or not new_axes or old_axes[-1] != array.channels:
            return None
        length = shape[new_axes[-1]]
        if array.channels in array.whole_axes and length != array.shape[array.channels]:
            return None
        return new_axes[-1] if length % array.codes_per_byte == 0 else None
    return None


def axis_groups(before: Sequence[int], after: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Return the shortest runs of old and of new axes that hold the same elements."""
    groups = []
    next_old = next_new = 0
    while next_old < len(before) or next_new < len(after):
        old_axes = [next_old] if next_old < len(before) else []
        new_axes = [next_new] if next_new < len(after) else []
        while True:
            old_size = math.prod(before[axis] for axis in old_axes)
            new_size = math.prod(after[axis] for axis in new_axes)
            if old_size == new_size:
                break
            if old_size < new_size:
                old_axes.append(next_old + len(old_axes))
            else:
                new_axes.append(next_new + len(new_axes))
        groups.append((old_axes, new_axes))
        next_old += len(old_axes)
        next_new += len(new_axes)
    return groups


def _common_blocks(
    old_lengths: Sequence[int], old_block: Sequence[int], new_lengths: Sequence[int]
) -> tuple[list[int], list[int]]:
    """Return blocks of the old and of the new axes that cut the flattened elements into the same runs."""
    run = _shared_run(old_lengths, old_block)
    while True:
        new_block = _largest_block(new_lengths, run)
        old_block = _largest_block(old_lengths, math.prod(new_block))
        run = math.prod(old_block)
        if run == math.prod(new_block):
            return old_block, new_block


def _shared_run(lengths: Sequence[int], block: Sequence[int]) -> int:
    """Return the length of the runs of flattened elements that surely share a scale."""
    run = 1
    for length, extent in zip(reversed(lengths), reversed(block), strict=True):
        run *= extent
        if extent != length:
            break
    return run


def _largest_block(lengths: Sequence[int], run: int) -> list[int]:
    """Return the largest block that a run of flattened elements allows, from the last axis on."""
    block: list[int] = []
    for length in reversed(lengths):
        extent = math.gcd(run, length)
        block.insert(0, extent)
        run = run // extent if extent == length else 1
    return block
