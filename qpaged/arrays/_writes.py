"""Writes: quantize as they scatter.

Every write is brought to one form: the operand's axes are *indexed* (each row names a coordinate) or
*whole* (each row covers them). ``rows`` is (rows, \\*whole extents); a row with any coordinate out of range,
negative included, is dropped.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from qpaged._platforms import by_platform
from qpaged.arrays import _tpu_write
from qpaged.arrays._blocks import beside, block_max, blocked
from qpaged.arrays._folds import unfold
from qpaged.arrays._indices import clipped
from qpaged.arrays._packing import merge, pack, unpack
from qpaged.arrays._quantized import QuantizedArray, encode, extremes, fit, outer_grid, prepared, quantize

BLOCKS_AT_ONCE = 64  # blocks that one step of the growth loop rescales, at least

Axes = tuple[int, ...]


def write_rows(array: Any, axes: Sequence[int], coordinates: Sequence[jax.Array], rows: Any) -> Any:
    """``array`` with ``rows`` written at ``coordinates`` along ``axes``; out of range is dropped.

    Args:
        array: a plain array or a :class:`QuantizedArray`.
        axes: the indexed axes, ascending.
        coordinates: one (rows,) integer array for each of ``axes``.
        rows: (rows, *extents of the other axes in order), plain or of the same format.

    A shared scale grows to fit by the quantizer's rule; the blocks it is grown under are rescaled once.
    Cost is that of the rows and of the blocks they touch, whatever the size of ``array``.

    Raises:
        ValueError: the format cannot be written to in such rows; :func:`takes_rows` says so beforehand.
    """
    axes = tuple(axes)
    index = jnp.stack([clipped(c) for c in coordinates], axis=-1)
    if len(index) == 0:
        return array
    if not isinstance(array, QuantizedArray):
        return scatter_rows(array, axes, index, jnp.asarray(rows).astype(array.dtype))
    if isinstance(rows, QuantizedArray):
        if moves_whole_blocks(array, axes, rows):
            return move_rows(array, axes, index, rows)
        rows = rows.dequantize()
    if not takes_rows(array, axes):
        raise ValueError(
            f"array must be written in whole blocks, since scales of {array.quantizer} do not grow or its "
            f"channels go together, but blocks {array.block} are written in part; write more at once."
        )
    rows = lax.stop_gradient(jnp.asarray(rows))
    if array.scales is None:
        codes = array.quantizer.encode(rows.astype(array.dtype))
        return _put(array, axes, index, codes)
    return _quantize_rows(
        array, axes, index, prepared(rows, array.quantizer, array.dtype, _channels(array, axes))
    )


def takes_rows(array: QuantizedArray, axes: Sequence[int]) -> bool:
    """Whether rows that name a coordinate along each of ``axes`` can be written."""
    quantizer, channels = array.quantizer, array.channel_axis % array.ndim
    own = all(array.block[axis] == 1 for axis in axes)
    grows = quantizer.shareable and array.outer is None
    turned = quantizer.transforms and channels in axes
    packed = array.packing > 1 and channels in axes and array.block[channels] > 1
    return quantizer.writable and array.offsets is None and (own or grows) and not (turned or packed)


def overwrite(array: Any, new: Any) -> Any:
    """``array`` with every element replaced by ``new``: fresh scales, the same blocks."""
    if isinstance(new, QuantizedArray):
        same = (new.quantizer, new.block, new.channel_axis) == (
            array.quantizer,
            array.block,
            array.channel_axis,
        )
        return array.like(*_parts(new)) if same else overwrite(array, new.dequantize())
    new = quantize(lax.stop_gradient(new), array.quantizer, array.block, array.dtype, array.channel_axis)
    return array.like(*_parts(new))


def _quantize_rows(array: QuantizedArray, axes: Axes, index: jax.Array, rows: jax.Array) -> QuantizedArray:
    """Rows (rows, *whole), prepared. Rows of one block are fitted together, and so are duplicates."""
    quantizer, grid = array.quantizer, array.scales.shape
    blocks = index // jnp.array([array.block[axis] for axis in axes], jnp.int32)
    whole = tuple(n for axis, n in enumerate(grid) if axis not in axes)
    low, high = jax.vmap(lambda row: extremes(row, whole))(rows)
    distinct, of_row = _distinct(blocks, tuple(grid[axis] for axis in axes))
    low = jax.ops.segment_min(low, of_row, len(rows))
    high = jax.ops.segment_max(high, of_row, len(rows))

    outer_shape = outer_grid(quantizer, whole, _channels(array, axes))
    scales, outer = jax.vmap(lambda low, high: fit(quantizer, low, high, outer_shape))(low, high)
    if _tpu_write.takes(array, axes, len(rows)) and _tpu_write.grows(array):
        arguments = array, distinct, of_row, index, rows, scales, low, high
        return array.like(*by_platform(*arguments, default=_grow_and_scatter, tpu=_write_pages))
    if any(array.block[axis] > 1 for axis in axes):  # scales that the rows share with others
        codes, scales = _grow(array, axes, distinct, scales, low, high)
        array = array.like(codes, *array.parts)
    if outer is None:
        new = jax.vmap(lambda row, s: encode(row, quantizer, s))(rows, scales[of_row])
    else:
        new = jax.vmap(lambda row, s, o: encode(row, quantizer, s, o))(rows, scales[of_row], outer[of_row])
    return _put(array, axes, index, new, distinct, scales, outer)


def _grow_and_scatter(array: QuantizedArray, distinct, of_row, index, rows, fresh, low, high):
    """Codes and scales of a pool with rows written to (page, slot), whose pages share scales."""
    axes = 1, 2
    codes, scales = _grow(array, axes, distinct, fresh, low, high)
    new = jax.vmap(lambda row, s: encode(row, array.quantizer, s))(rows, scales[of_row])
    stored = scatter_rows(array.scales, axes, distinct, scales)
    return _scatter_codes(array, codes, axes, index, new), stored


def _write_pages(array: QuantizedArray, distinct, of_row, index, rows, fresh, low, high):
    """The same on TPUs."""
    pages = jnp.where(distinct[:, 1] == 0, distinct[:, 0], array.shape[1])
    old = _tpu_write.take(array.scales, pages)
    scales = _grown_scales(array, pages, old[:, :, 0], fresh, low, high)
    new = jax.vmap(lambda row, s: encode(row, array.quantizer, s))(rows, scales[of_row])
    packed, new_scales = pack(new, array.quantizer.bits, -1), jnp.expand_dims(scales, 2)
    codes = _tpu_write.write(array, pages, of_row, index[:, 1], packed, (old, new_scales))
    return codes, _tpu_write.put(array.scales, pages, new_scales)


def _put(array: QuantizedArray, axes: Axes, index, new, blocks=None, scales=None, outer=None):
    """The array with the codes ``new``, one an element, put at ``index``, and scales at ``blocks``."""
    if _tpu_write.takes(array, axes, len(index)):
        bare = array.like(array.codes, None)
        codes = by_platform(bare, index, new, default=_scatter_slots, tpu=_put_slots)
        put = functools.partial(by_platform, default=_scatter_blocks, tpu=_tpu_write.put_slots)
    else:
        codes = _scatter_codes(array, array.codes, axes, index, new)
        put = functools.partial(_scatter_blocks, axes=axes)
    parts = (array.scales, scales), (array.outer, outer)
    scales, outer = (new if new is None else put(part, blocks, new) for part, new in parts)
    return array.like(codes, scales, None, outer)


def _scatter_blocks(part: jax.Array, blocks: jax.Array, new: jax.Array, axes: Axes = (1, 2)) -> jax.Array:
    return scatter_rows(part, axes, blocks, new)


def _scatter_slots(array: QuantizedArray, index: jax.Array, new: jax.Array) -> jax.Array:
    """The codes of a pool with ``new`` put at (page, slot)."""
    return _scatter_codes(array, array.codes, (1, 2), index, new)


def _put_slots(array: QuantizedArray, index: jax.Array, new: jax.Array) -> jax.Array:
    """The same on TPUs."""
    pages, of_row = _distinct(index[:, :1], array.shape[1:2])
    return _tpu_write.write(
        array, pages[:, 0], of_row, index[:, 1], pack(new, array.quantizer.bits, array.channel_axis)
    )


def _distinct(blocks: jax.Array, grid: Axes) -> tuple[jax.Array, jax.Array]:
    """Coordinates of the distinct blocks among ``blocks`` (rows, axes), and which of them each row is in.

    Unused places hold a coordinate past the end, which gathers and scatters drop, and so do rows that are out
    of range, negative ones included.
    """
    strides = [1]
    for extent in reversed(grid[1:]):
        strides.insert(0, strides[0] * extent)
    nowhere = grid[0] * strides[0]
    inside = jnp.all((blocks >= 0) & (blocks < jnp.array(grid, jnp.int32)), axis=-1)
    flat = (blocks * jnp.array(strides, jnp.int32)).sum(axis=-1, dtype=jnp.int32)
    flat = jnp.where(inside, flat, nowhere)
    order = jnp.argsort(flat)
    ascending = flat[order]
    begins = jnp.append(jnp.zeros(1, bool), ascending[1:] != ascending[:-1])
    place = jnp.cumsum(begins, dtype=jnp.int32)
    of_row = jnp.zeros(len(flat), jnp.int32).at[order].set(place)
    found = jnp.full(len(flat), nowhere, jnp.int32).at[place].set(ascending)
    coordinates = [found // stride % extent for stride, extent in zip(strides[1:], grid[1:], strict=True)]
    return jnp.stack([found // strides[0], *coordinates], axis=-1), of_row


def _grow(
    array: QuantizedArray, axes: Axes, blocks: jax.Array, fresh: jax.Array, low: jax.Array, high: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Codes and scales of distinct ``blocks`` that are to hold new extremes.

    Blocks in which nothing was written get their ``fresh`` scales. The others keep theirs if they can; those
    that cannot are fitted again, and their codes rescaled: a loop over chunks, since most writes grow few
    blocks and a fresh page grows none.
    """
    quantizer = array.quantizer
    old = gather_rows(array.scales, axes, blocks)
    used = old != 0
    grows = used & ~quantizer.holds(old, low, high)
    chosen, steps, chunk = _chunked(grows.reshape(len(blocks), -1).any(axis=1))
    at_end = jnp.array([array.scales.shape[axis] for axis in axes], jnp.int32)

    def rescale(step, state):
        codes, scales = state
        row = lax.dynamic_slice_in_dim(chosen, step * chunk, chunk)
        at = jnp.where((row < len(blocks))[:, None], blocks.at[row].get(mode="clip"), at_end)
        windows = _gather_windows(codes, axes, at, array)
        grown, new = jax.vmap(lambda *window: _grow_window(array, axes, *window))(
            windows, scales.at[row].get(mode="clip"), grows[row], low[row], high[row]
        )
        return _scatter_windows(codes, axes, at, array, grown), scales.at[row].set(new, mode="drop")

    return lax.fori_loop(jnp.int32(0), steps, rescale, (array.codes, jnp.where(used, old, fresh)))


def _grown_scales(array: QuantizedArray, pages: jax.Array, old: jax.Array, fresh, low, high) -> jax.Array:
    """What :func:`_grow` makes the ``old`` scales of ``pages``; codes are left."""
    used = old != 0
    grows = used & ~array.quantizer.holds(old, low, high)
    chosen, steps, chunk = _chunked(grows.reshape(len(pages), -1).any(axis=1))

    def refit(step, scales):
        row = lax.dynamic_slice_in_dim(chosen, step * chunk, chunk)
        windows = _tpu_write.take(array.folded, pages.at[row].get(mode="clip"))
        windows = jnp.expand_dims(unfold(windows, array.folds), 2)
        _, new = jax.vmap(lambda *window: _grow_window(array, (1, 2), *window))(
            windows, scales.at[row].get(mode="clip"), grows[row], low[row], high[row]
        )
        return scales.at[row].set(new, mode="drop")

    return lax.fori_loop(jnp.int32(0), steps, refit, jnp.where(used, old, fresh))


def _chunked(needed: jax.Array) -> tuple[jax.Array, jax.Array, int]:
    """Indices of what is needed, the number of rows where there are no more; and how to walk over them."""
    rows = len(needed)
    chunk = min(rows, max(BLOCKS_AT_ONCE, rows // 8))
    padded = -(-rows // chunk) * chunk
    place = jnp.where(needed, jnp.cumsum(needed, dtype=jnp.int32) - 1, padded)
    chosen = jnp.full(padded, rows, jnp.int32).at[place].set(jnp.arange(rows, dtype=jnp.int32), mode="drop")
    return chosen, (jnp.sum(needed, dtype=jnp.int32) + chunk - 1) // chunk, chunk


def _grow_window(array: QuantizedArray, axes: Axes, window, old, grows, low, high):
    """One window of blocks: the codes and the scales of those that grow made anew, the others left.

    The others are those that hold the new values, and, beside them, those that nothing was written to.
    """
    quantizer = array.quantizer
    dtype = quantizer.code_dtype(array.dtype)
    codes = unpack(window, quantizer.bits, array.channel_axis, dtype)
    grid = tuple(1 if axis in axes else n for axis, n in enumerate(array.scales.shape))
    old, grows, low, high = (part.reshape(grid) for part in (old, grows, low, high))
    new = jnp.where(grows, quantizer.refit(old, block_max(codes, grid), low, high), old)
    grown = jnp.where(
        beside(grows), quantizer.grow(blocked(codes, grid), beside(old), beside(new)), blocked(codes, grid)
    )
    packed = pack(grown.reshape(codes.shape), quantizer.bits, array.channel_axis)
    return packed, new.reshape([n for axis, n in enumerate(grid) if axis not in axes])


def moves_whole_blocks(array: QuantizedArray, axes: Axes, rows: QuantizedArray) -> bool:
    """Whether ``rows`` are whole blocks of the same format, which move without being decoded."""
    own = all(array.block[axis] == 1 for axis in axes)
    if not own or rows.quantizer != array.quantizer or rows.dtype != array.dtype:
        return False
    if any(
        (part is None) != (other is None) for part, other in zip(_parts(array), _parts(rows), strict=True)
    ):
        return False
    channels = array.channel_axis % array.ndim
    if (array.packing > 1 or array.quantizer.transforms) and (
        channels in axes or _channels(array, axes) != rows.channel_axis
    ):
        return False
    whole = tuple(b for axis, b in enumerate(array.block) if axis not in axes)
    return rows.block[1:] == whole


def move_rows(array: QuantizedArray, axes: Axes, index: jax.Array, rows: QuantizedArray) -> QuantizedArray:
    """Rows of the same format, codes and scales moved together."""
    return array.like(
        *(
            None if part is None else scatter_rows(part, axes, index, update)
            for part, update in zip(_parts(array), _parts(rows), strict=True)
        )
    )


def _parts(array: QuantizedArray) -> tuple[Any, Any, Any, Any]:
    """The children, as :meth:`QuantizedArray.like` takes them."""
    return (array.codes, *array.parts)


def _channels(array: QuantizedArray, axes: Sequence[int]) -> int:
    """The channel axis of rows that leave out ``axes``, counted from the end."""
    channels = array.channel_axis % array.ndim
    return -1 - sum(axis not in axes for axis in range(channels + 1, array.ndim))


def _scatter_codes(array: QuantizedArray, codes: jax.Array, axes: Axes, index: jax.Array, new: jax.Array):
    """``codes`` of an array with the codes ``new``, one an element, packed and put at ``index``."""
    channels, several = array.channel_axis % array.ndim, array.packing
    if several == 1 or channels not in axes:
        packed = pack(new, array.quantizer.bits, _channels(array, axes))
        return scatter_rows(codes, axes, index, packed)
    # Channels one by one: of the codes that share a byte, one at a time is put into it.
    along = axes.index(channels)
    at = index.at[:, along].set(index[:, along] // several)
    place = (index[:, along] % several).reshape(-1, *[1] * (new.ndim - 1))
    for turn in range(several):
        whole = merge(gather_rows(codes, axes, at), new, place, array.quantizer.bits)
        mine = place.reshape(-1, 1) == turn
        codes = scatter_rows(codes, axes, jnp.where(mine, at, jnp.int32(codes.size)), whole)
    return codes


def scatter_rows(operand, axes: Axes, index: jax.Array, updates, scatter=lax.scatter) -> jax.Array:
    """``updates`` (rows, *whole) put at ``index`` (rows, len(axes)); out of range is dropped."""
    numbers = lax.ScatterDimensionNumbers(
        update_window_dims=tuple(range(1, updates.ndim)),
        inserted_window_dims=axes,
        scatter_dims_to_operand_dims=axes,
    )
    mode = lax.GatherScatterMode.FILL_OR_DROP
    return scatter(operand, index, updates.astype(operand.dtype), numbers, mode=mode)


def gather_rows(operand, axes: Axes, index: jax.Array) -> jax.Array:
    """(rows, *whole) read at ``index`` (rows, len(axes)); zeros where that is out of range."""
    whole = operand.ndim - len(axes)
    numbers = lax.GatherDimensionNumbers(
        offset_dims=tuple(range(1, 1 + whole)), collapsed_slice_dims=axes, start_index_map=axes
    )
    sizes = tuple(1 if axis in axes else n for axis, n in enumerate(operand.shape))
    mode = lax.GatherScatterMode.FILL_OR_DROP
    return lax.gather(operand, index, numbers, sizes, mode=mode, fill_value=0)


def _gather_windows(codes, axes: Axes, blocks: jax.Array, array: QuantizedArray) -> jax.Array:
    """(rows, *window): the codes of whole blocks along ``axes``, of everything along the others."""
    numbers = lax.GatherDimensionNumbers(
        offset_dims=tuple(range(1, 1 + codes.ndim)), collapsed_slice_dims=(), start_index_map=axes
    )
    sizes = tuple(array.block[axis] if axis in axes else n for axis, n in enumerate(codes.shape))
    mode = lax.GatherScatterMode.FILL_OR_DROP
    return lax.gather(codes, _starts(axes, blocks, array), numbers, sizes, mode=mode, fill_value=0)


def _scatter_windows(codes, axes: Axes, blocks: jax.Array, array: QuantizedArray, windows) -> jax.Array:
    numbers = lax.ScatterDimensionNumbers(
        update_window_dims=tuple(range(1, windows.ndim)),
        inserted_window_dims=(),
        scatter_dims_to_operand_dims=axes,
    )
    mode = lax.GatherScatterMode.FILL_OR_DROP
    return lax.scatter(codes, _starts(axes, blocks, array), windows, numbers, mode=mode)


def _starts(axes: Axes, blocks: jax.Array, array: QuantizedArray) -> jax.Array:
    return blocks * jnp.array([array.block[axis] for axis in axes], jnp.int32)
