"""Gathers of quantized arrays: codes by element, scales by block, both past the end where the index is."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.lax import GatherDimensionNumbers, GatherScatterMode

from qpaged._compat import operand_batching_dims
from qpaged.arrays._blocks import refine
from qpaged.arrays._indices import clip_to_int32
from qpaged.arrays._lane_rows import from_lane_rows
from qpaged.arrays._moves import codes_shape, moved
from qpaged.arrays._quantized import QuantizedArray
from qpaged.arrays._read_format import channels_matter, free_channels, nan_code_and_scale


def gather(
    array: QuantizedArray,
    index: jax.Array,
    numbers: GatherDimensionNumbers,
    sizes: Sequence[int],
    mode: GatherScatterMode,
    fill_value: float | None,
) -> QuantizedArray | None:
    """Return ``lax.gather``; None where a window cuts through blocks at places known only at run time.

    What is read past the end is NaN, or 0 where ``fill_value`` is, as from a plain array.
    """
    channels = array.channels
    if channels_matter(array) and sizes[channels] != array.shape[channels]:
        unpacked = free_channels(array)
        if unpacked is None:
            return None
        return gather(unpacked, index, numbers, sizes, mode, fill_value)
    array = _with_own_scales_along(array, operand_batching_dims(numbers))
    fill = _fill_code_and_scale(array, fill_value)
    if fill is None or not _windows_fit_blocks(array, numbers, sizes):
        return None
    code_fill, scale_fill = fill
    codes = _gather_codes(array, index, numbers, sizes, mode, code_fill)

    def gather_part(part: jax.Array, block: Sequence[int]) -> jax.Array:
        extents = []
        for size, length, count in zip(sizes, array.shape, part.shape, strict=True):
            extents.append(count if size == length else min(size, count))
        block_index = _block_index(array.shape, block, index, numbers.start_index_map, sizes, mode)
        return lax.gather(part, block_index, numbers, extents, mode=mode, fill_value=scale_fill)

    return moved(array, codes, gather_part, _gathered_channels(array, index, numbers))


def _with_own_scales_along(array: QuantizedArray, batching: Sequence[int]) -> QuantizedArray:
    """Return the array with a scale for each element along batching axes, which all operands divide alike."""

    def refine_part(part: jax.Array) -> jax.Array:
        for axis in batching:
            if part.shape[axis] == 1:  # as of static scales
                part = refine(part, axis, array.shape[axis])
        return part

    return array.like(array.codes, array.parts.map(refine_part)) if batching else array


def _fill_code_and_scale(
    array: QuantizedArray, fill_value: float | None
) -> tuple[int, float | int | None] | None:
    """Return the code and the scale that read as ``fill_value``; None where nothing does."""
    if fill_value is None or np.isnan(fill_value):
        return nan_code_and_scale(array)
    return (0, 0) if fill_value == 0 else None


def _gather_codes(
    array: QuantizedArray,
    index: jax.Array,
    numbers: GatherDimensionNumbers,
    sizes: Sequence[int],
    mode: GatherScatterMode,
    fill: int,
) -> jax.Array:
    if array.slots_per_row > 1 and _takes_whole_pages(array, index, numbers, sizes):
        # Gathered in the rows that they are stored in, pages are all that a TPU moves.
        extents = [*sizes[:-2], *array.stored.shape[-2:]]
        rows = lax.gather(array.stored, index, numbers, extents, mode=mode, fill_value=fill)
        return from_lane_rows(rows, array.slots_per_row)
    extents = codes_shape(array, sizes)
    return lax.gather(array.codes, index, numbers, extents, mode=mode, fill_value=fill)


def _takes_whole_pages(
    array: QuantizedArray, index: jax.Array, numbers: GatherDimensionNumbers, sizes: Sequence[int]
) -> bool:
    """Return True if slots and channels, the last two axes, are read whole and come out last."""
    named = {*numbers.collapsed_slice_dims, *numbers.start_index_map, *operand_batching_dims(numbers)}
    result_ndim = len(numbers.offset_dims) + index.ndim - 1
    if tuple(sizes[-2:]) != array.shape[-2:] or not named.isdisjoint((array.ndim - 2, array.ndim - 1)):
        return False
    return tuple(numbers.offset_dims[-2:]) == (result_ndim - 2, result_ndim - 1)


def _windows_fit_blocks(array: QuantizedArray, numbers: GatherDimensionNumbers, sizes: Sequence[int]) -> bool:
    """Return True if every window is of whole blocks, or inside one, wherever it lies."""
    batching = operand_batching_dims(numbers)
    for part in (array.scales, array.global_scale):
        if part is None:
            continue
        for axis, (size, length, count) in enumerate(zip(sizes, array.shape, part.shape, strict=True)):
            fits = axis not in batching and (count == 1 or size in (1, length))
            if count != length and not fits:
                return False
    return True


def _gathered_channels(array: QuantizedArray, index: jax.Array, numbers: GatherDimensionNumbers) -> int:
    """Return the axis of the result that a gather of whole channels puts them on; the last if on none."""
    removed = (*numbers.collapsed_slice_dims, *operand_batching_dims(numbers))
    windows = [axis for axis in range(array.ndim) if axis not in removed]
    if array.channels not in windows:
        return len(numbers.offset_dims) + index.ndim - 2
    return numbers.offset_dims[windows.index(array.channels)]


def _block_index(
    shape: Sequence[int],
    block: Sequence[int],
    index: jax.Array,  # (..., len(axes))
    axes: Sequence[int],
    sizes: Sequence[int],
    mode: GatherScatterMode,
) -> jax.Array:
    """Return the indices of blocks for indices of elements, past the end where those are."""
    index = clip_to_int32(index)
    last_start = jnp.array([shape[axis] - sizes[axis] for axis in axes], jnp.int32)
    if mode == GatherScatterMode.CLIP:
        index = jnp.clip(index, 0, last_start)
    block_index = index // jnp.array([block[axis] for axis in axes], jnp.int32)
    past_end = jnp.array([shape[axis] for axis in axes], jnp.int32)
    return jnp.where((index >= 0) & (index <= last_start), block_index, past_end)
