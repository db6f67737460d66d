"""Writes: rows are quantized as they are scattered, and shared scales grow to hold them."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from qpaged._platforms import by_platform
from qpaged.arrays import _tpu_write
from qpaged.arrays._encoding import (
    block_extremes,
    encode,
    fit_blocks,
    fit_scales,
    global_scale_shape,
    to_block_values,
)
from qpaged.arrays._growth import NewExtremes, grow_blocks, grow_page_scales
from qpaged.arrays._indices import clip_to_int32
from qpaged.arrays._packing import insert_codes, pack
from qpaged.arrays._quantized import BlockParts, QuantizedArray
from qpaged.arrays._read_format import channels_matter
from qpaged.arrays._scatter import Axes, gather_rows, group_by_block, scatter_heads, scatter_rows

PAGE_AND_SLOT: Axes = (1, 2)  # of a pool's codes; of its scales, page and block within the page


class TargetBlocks(NamedTuple):
    """The blocks that rows are written to.

    Attributes:
        distinct: (rows, axes) int32; the coordinates of each block, once and ascending. Unused entries are
            past the end.
        of_row: (rows,) int32; for each row, the index of its block in ``distinct``.
    """

    distinct: jax.Array
    of_row: jax.Array


def write_rows(array: Any, axes: Sequence[int], coordinates: Sequence[jax.Array], rows: Any) -> Any:
    """Return ``array`` with rows written at ``coordinates`` along ``axes``; those out of range are dropped.

    Args:
        array: a plain array or a :class:`QuantizedArray`.
        axes: the indexed axes, ascending.
        coordinates: one (rows,) integer array for each of ``axes``.
        rows: (rows, *extents of the other axes in order), plain or quantized; whole blocks of the same format
            are moved undecoded.

    A shared scale grows by the quantizer's rule until it covers the rows; the codes under it are requantized
    once. Static scales stay, and rows are encoded under them. Cost is that of the rows and of the blocks they
    touch, whatever the size of ``array``.

    Raises:
        ValueError: the format cannot be written to in such rows; :func:`takes_rows` says so beforehand.
    """
    axes = tuple(axes)
    index = jnp.stack([clip_to_int32(along_axis) for along_axis in coordinates], axis=-1)
    if index.shape[0] == 0:
        return array
    if not isinstance(array, QuantizedArray):
        rows = jnp.asarray(rows).astype(array.dtype)
        if axes == PAGE_AND_SLOT and array.ndim == 4:
            return by_platform(array, index, rows, default=_scatter_slots_of_plain, tpu=scatter_heads)
        return scatter_rows(array, axes, index, rows)
    if not is_writable(array):
        raise ValueError(
            f"array must be as {array.quantizer} stores it, but came as a lazy read of such an array; "
            f"write to the array that was read."
        )
    if isinstance(rows, QuantizedArray):
        if are_whole_blocks(array, axes, rows):
            return scatter_parts(array, axes, index, rows)
        rows = rows.dequantize()
    if not takes_rows(array, axes):
        raise ValueError(
            f"array must be written in whole blocks, since scales of {array.quantizer} do not grow or its "
            f"channels go together, but blocks {array.block} are written in part; write more at once."
        )
    rows = lax.stop_gradient(jnp.asarray(rows))  # rounding has no useful derivative
    if array.scales is None:
        codes = array.quantizer.encode(rows.astype(array.dtype))
        return array.like(_put_codes(array, axes, index, codes), array.parts)
    row_channels = channel_axis_of_rows(array, axes)
    rows = to_block_values(rows, array.quantizer, array.dtype, row_channels)
    if array.quantizer.has_static_scales:
        return _encode_under_own_scales(array, axes, index, rows)
    return _quantize_rows(array, axes, index, rows)


def is_writable(array: QuantizedArray) -> bool:
    """Return True if the array is as its format stores it, and not one that a lazy read made."""
    return array.quantizer.writable and array.offset is None


def takes_rows(array: QuantizedArray, axes: Sequence[int]) -> bool:
    """Return True if rows that name a coordinate along each of ``axes`` can be written."""
    quantizer = array.quantizer
    if not is_writable(array):
        return False
    if array.channels in axes:
        # Single channels with scales of their own are inserted into their bytes one by one.
        splits_bytes = array.codes_per_byte > 1 and array.block[array.channels] > 1
        if array.channels in array.whole_axes or splits_bytes:
            return False
    if quantizer.has_static_scales:
        return True
    covers_blocks = all(array.block[axis] == 1 for axis in axes)
    # Growth knows one level of scales.
    return covers_blocks or (quantizer.growth is not None and array.global_scale is None)


def are_whole_blocks(array: QuantizedArray, axes: Axes, rows: QuantizedArray) -> bool:
    """Return True if ``rows`` are whole blocks of the array's format, which move without being decoded."""
    if any(array.block[axis] > 1 for axis in axes):
        return False
    if rows.quantizer != array.quantizer or rows.dtype != array.dtype:
        return False
    for part, row_part in zip(array.parts, rows.parts, strict=True):
        if (part is None) != (row_part is None):
            return False
    if channels_matter(array):
        same_channels = channel_axis_of_rows(array, axes) == rows.channel_axis
        if array.channels in axes or not same_channels:
            return False
    kept_block = tuple(extent for axis, extent in enumerate(array.block) if axis not in axes)
    return rows.block[1:] == kept_block


def scatter_parts(
    array: QuantizedArray, axes: Axes, index: jax.Array, rows: QuantizedArray
) -> QuantizedArray:
    """Return ``array`` with rows of its format put at ``index``, codes and scales together."""
    codes = scatter_rows(array.codes, axes, index, rows.codes)
    parts: list[jax.Array | None] = []
    for part, row_part in zip(array.parts, rows.parts, strict=True):
        if part is None or row_part is None:
            parts.append(None)
        else:
            parts.append(scatter_rows(part, axes, index, row_part))
    return array.like(codes, BlockParts(*parts))


def _encode_under_own_scales(
    array: QuantizedArray,
    axes: Axes,
    index: jax.Array,  # [rows, len(axes)]
    rows: jax.Array,  # [rows, *kept extents], from to_block_values
) -> QuantizedArray:
    """Return ``array`` with rows written under the scales that it has, which stay."""
    block_index = index // jnp.array([array.block[axis] for axis in axes], jnp.int32)
    scales = gather_rows(array.block_scales, axes, block_index)
    codes = _encode_each(array, axes, rows, scales)
    return array.like(_put_codes(array, axes, index, codes), array.parts)


def _quantize_rows(
    array: QuantizedArray,
    axes: Axes,
    index: jax.Array,  # [rows, len(axes)]
    rows: jax.Array,  # [rows, *kept extents], from to_block_values: finite, float32, transformed
) -> QuantizedArray:
    """Return ``array`` with rows written; those of one block are fitted together, duplicates included."""
    quantizer, grid = array.quantizer, array.block_scales.shape
    block_index = index // jnp.array([array.block[axis] for axis in axes], jnp.int32)
    blocks = TargetBlocks(*group_by_block(block_index, tuple(grid[axis] for axis in axes)))
    kept_grid = tuple(count for axis, count in enumerate(grid) if axis not in axes)
    if quantizer.block_fit is not None:
        return _fit_each_row(array, axes, index, rows, blocks)
    low, high = jax.vmap(lambda row: block_extremes(row, kept_grid))(rows)
    # Entries without rows get infinities, and meaningless scales, which the scatter drops.
    low = jax.ops.segment_min(low, blocks.of_row, rows.shape[0])
    high = jax.ops.segment_max(high, blocks.of_row, rows.shape[0])
    global_shape = global_scale_shape(quantizer, kept_grid, channel_axis_of_rows(array, axes))
    fitted = jax.vmap(lambda low, high: fit_scales(quantizer, low, high, global_shape))(low, high)

    new = NewExtremes(fitted.scales, low, high)
    if _tpu_write.takes(array, axes, rows.shape[0]) and _tpu_write.grows(array):
        arguments = array, blocks, index, rows, new
        codes, scales = by_platform(*arguments, default=_grow_and_scatter, tpu=_grow_and_scatter_on_tpu)
        return array.like(codes, BlockParts(scales))
    scales = fitted.scales
    if any(array.block[axis] > 1 for axis in axes):  # rows share scales with what was written before
        codes, scales = grow_blocks(array, axes, blocks.distinct, new)
        array = array.like(codes, array.parts)
    codes = _encode_rows(array, axes, rows, blocks.of_row, scales, fitted.global_scale)
    new_parts = BlockParts(scales, fitted.global_scale)
    return array.like(
        _put_codes(array, axes, index, codes),
        _put_parts(array, axes, blocks.distinct, new_parts, rows.shape[0]),
    )


def _fit_each_row(
    array: QuantizedArray, axes: Axes, index: jax.Array, rows: jax.Array, blocks: TargetBlocks
) -> QuantizedArray:
    """Return ``array`` with rows written that are whole blocks; of several to one block the last counts."""
    count, channel_axis = rows.shape[0], channel_axis_of_rows(array, axes)
    kept_grid = tuple(size for axis, size in enumerate(array.block_scales.shape) if axis not in axes)
    of_rows = jax.vmap(lambda row: fit_blocks(array.quantizer, row, kept_grid, channel_axis))(rows)
    # Entries without rows get that of any row, which the scatter drops.
    last = jax.ops.segment_max(jnp.arange(count, dtype=jnp.int32), blocks.of_row, count)
    scales = of_rows.scales[jnp.maximum(last, 0)]
    codes = _encode_rows(array, axes, rows, blocks.of_row, scales)
    return array.like(
        _put_codes(array, axes, index, codes),
        _put_parts(array, axes, blocks.distinct, BlockParts(scales), count),
    )


def _encode_rows(
    array: QuantizedArray,
    axes: Axes,
    rows: jax.Array,
    block_of_row: jax.Array,
    scales: jax.Array,
    global_scale: jax.Array | None = None,
) -> jax.Array:
    """Return the codes of each row under the scales of its block."""
    if global_scale is None:
        return _encode_each(array, axes, rows, scales[block_of_row])
    return _encode_each(array, axes, rows, scales[block_of_row], global_scale[block_of_row])


def _encode_each(array: QuantizedArray, axes: Axes, rows: jax.Array, *scales: jax.Array) -> jax.Array:
    """Return the codes of rows that leave out ``axes``, under stored scales, and global ones, of each."""
    channel_axis = channel_axis_of_rows(array, axes)

    def of_row(row: jax.Array, *scales: jax.Array) -> jax.Array:
        return encode(row, array.quantizer, *scales, channel_axis=channel_axis)

    return jax.vmap(of_row)(rows, *scales)


def _grow_and_scatter(
    array: QuantizedArray, blocks: TargetBlocks, index: jax.Array, rows: jax.Array, new: NewExtremes
) -> tuple[jax.Array, jax.Array]:
    """Return codes and scales of a pool with rows written to (page, slot), whose pages share scales."""
    codes, scales = grow_blocks(array, PAGE_AND_SLOT, blocks.distinct, new)
    row_codes = _encode_rows(array, PAGE_AND_SLOT, rows, blocks.of_row, scales)
    stored_scales = scatter_rows(array.block_scales, PAGE_AND_SLOT, blocks.distinct, scales)
    return _scatter_codes(array, codes, PAGE_AND_SLOT, index, row_codes), stored_scales


def _grow_and_scatter_on_tpu(
    array: QuantizedArray, blocks: TargetBlocks, index: jax.Array, rows: jax.Array, new: NewExtremes
) -> tuple[jax.Array, jax.Array]:
    """Return what :func:`_grow_and_scatter` does, by the kernel that writes pages."""
    pages = blocks.distinct[:, 0]  # a page is one block along the slots; unused entries are past the end
    old = _tpu_write.gather_pages(array.block_scales, pages)
    # [n, kv_heads, 1, channels or 1] without the axis of the slots.
    scales = grow_page_scales(array, pages, old[:, :, 0], new)
    row_codes = _encode_rows(array, PAGE_AND_SLOT, rows, blocks.of_row, scales)
    row_codes = pack(row_codes, array.quantizer.bits, -1)
    new_scales = jnp.expand_dims(scales, 2)
    regrown = _tpu_write.ScalesOfPages(old, new_scales)
    codes = _tpu_write.write(array, pages, blocks.of_row, index[:, 1], row_codes, regrown)
    return codes, _tpu_write.scatter_pages(array.block_scales, pages, new_scales)


def _put_codes(array: QuantizedArray, axes: Axes, index: jax.Array, codes: jax.Array) -> jax.Array:
    """Return the codes of ``array`` with ``codes``, one an element, put at ``index``."""
    if not _tpu_write.takes(array, axes, index.shape[0]):
        return _scatter_codes(array, array.codes, axes, index, codes)
    without_parts = array.like(array.codes, BlockParts(None))  # all that is passed would be an operand
    return by_platform(without_parts, index, codes, default=_scatter_slots, tpu=_scatter_slots_on_tpu)


def _scatter_slots(array: QuantizedArray, index: jax.Array, codes: jax.Array) -> jax.Array:
    """Return the codes of a pool with ``codes`` put at (page, slot)."""
    return _scatter_codes(array, array.codes, PAGE_AND_SLOT, index, codes)


def _scatter_slots_on_tpu(array: QuantizedArray, index: jax.Array, codes: jax.Array) -> jax.Array:
    """Return what :func:`_scatter_slots` does, by the kernel that writes pages."""
    pages, page_of_row = group_by_block(index[:, :1], array.shape[1:2])
    packed = pack(codes, array.quantizer.bits, array.channel_axis)
    return _tpu_write.write(array, pages[:, 0], page_of_row, index[:, 1], packed)


def _scatter_slots_of_plain(pool: jax.Array, index: jax.Array, rows: jax.Array) -> jax.Array:
    """Return a plain pool with ``rows`` put at (page, slot)."""
    return scatter_rows(pool, PAGE_AND_SLOT, index, rows)


def _put_parts(
    array: QuantizedArray, axes: Axes, blocks: jax.Array, new: BlockParts, num_rows: int
) -> BlockParts:
    """Return the parts of ``array`` with ``new`` ones put at ``blocks``."""
    parts: list[jax.Array | None] = []
    for part, new_part in zip(array.parts, new, strict=True):
        if part is None or new_part is None:
            parts.append(part)
        elif _tpu_write.takes(array, axes, num_rows):
            default, tpu = _scatter_scales, _tpu_write.scatter_slot_scales
            parts.append(by_platform(part, blocks, new_part, default=default, tpu=tpu))
        else:
            parts.append(scatter_rows(part, axes, blocks, new_part))
    return BlockParts(*parts)


def _scatter_scales(part: jax.Array, blocks: jax.Array, new: jax.Array) -> jax.Array:
    """Return the scales of a pool with ``new`` ones put at (page, block within it)."""
    return scatter_rows(part, PAGE_AND_SLOT, blocks, new)


def rows_at(array: QuantizedArray, axes: Sequence[int], index: jax.Array) -> QuantizedArray:
    """Return the rows [rows, *extents of the other axes] at ``index`` along ``axes``, still quantized."""
    axes = tuple(axes)
    block = jnp.array([array.block[axis] for axis in axes], jnp.int32)
    parts = array.parts.map(lambda part: gather_rows(part, axes, index // block))
    codes = gather_rows(array.codes, axes, index)
    return array.like(codes, parts, channel_axis=channel_axis_of_rows(array, axes))


def channel_axis_of_rows(array: QuantizedArray, axes: Sequence[int]) -> int:
    """Return the channel axis of rows that leave out ``axes``, counted from the end."""
    after = range(array.channels + 1, array.ndim)
    return -1 - sum(axis not in axes for axis in after)


def _scatter_codes(
    array: QuantizedArray, codes: jax.Array, axes: Axes, index: jax.Array, new: jax.Array
) -> jax.Array:
    """Return ``codes`` of an array with the codes ``new``, one an element, packed and put at ``index``."""
    if array.codes_per_byte == 1 or array.channels not in axes:
        packed = pack(new, array.quantizer.bits, channel_axis_of_rows(array, axes))
        return scatter_rows(codes, axes, index, packed)
    return _scatter_into_bytes(array, codes, axes, index, new)


def _scatter_into_bytes(
    array: QuantizedArray, codes: jax.Array, axes: Axes, index: jax.Array, new: jax.Array
) -> jax.Array:
    """Return ``codes`` with single channels written, each of which is a part of a byte.

    Codes that share a byte are written in turns, since a scatter replaces whole bytes.
    """
    column, codes_per_byte = axes.index(array.channels), array.codes_per_byte
    which_byte = index.at[:, column].set(index[:, column] // codes_per_byte)
    byte_index = index[:, column] % codes_per_byte
    byte_index_of_rows = byte_index.reshape(-1, *[1] * (new.ndim - 1))
    past_end = jnp.int32(max(codes.shape))
    for turn in range(codes_per_byte):
        old = gather_rows(codes, axes, which_byte)
        changed = insert_codes(old, new, byte_index_of_rows, array.quantizer.bits)
        target = jnp.where(byte_index[:, None] == turn, which_byte, past_end)
        codes = scatter_rows(codes, axes, target, changed)
    return codes
