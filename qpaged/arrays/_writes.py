"""Writes: quantize as they scatter.

Every write is brought to one form: the operand's axes are *indexed* (each row names a coordinate) or
*whole* (each row covers them). ``rows`` is (rows, \\*whole extents); a row with any coordinate out of range,
negative included, is dropped.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from qpaged.arrays._blocks import beside, block_max, blocked
from qpaged.arrays._indices import clipped
from qpaged.arrays._quantized import QuantizedArray, encode, finite, quantize

ROWS_AT_ONCE = 64  # touched blocks that one step of the growth loop rescales, at least

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
    rows = lax.stop_gradient(jnp.asarray(rows))
    if array.scales is None:
        codes = array.quantizer.encode(rows.astype(array.dtype))
        return array.like(scatter_rows(array.codes, axes, index, codes), None)
    return _quantize_rows(array, axes, index, finite(rows, array.dtype))


def overwrite(array: Any, new: Any) -> Any:
    """``array`` with every element replaced by ``new``: fresh scales, the same blocks."""
    if isinstance(new, QuantizedArray):
        same = new.quantizer == array.quantizer and new.block == array.block
        return array.like(new.codes, new.scales) if same else overwrite(array, new.dequantize())
    return quantize(lax.stop_gradient(new), array.quantizer, array.block, array.dtype)


def _quantize_rows(array: QuantizedArray, axes: Axes, index: jax.Array, rows: jax.Array) -> QuantizedArray:
    if array.offsets is not None:
        raise NotImplementedError("offsets: arrays with offsets can be read, but not written to in part.")
    extents = jnp.array([array.block[axis] for axis in axes], jnp.int32)
    blocks = index // extents
    whole_counts = tuple(n for axis, n in enumerate(array.scales.shape) if axis not in axes)
    candidates = jax.vmap(lambda row: array.quantizer.scale(block_max(jnp.abs(row), whole_counts)))(rows)

    scales, codes = array.scales, array.codes
    owned = all(array.block[axis] == 1 for axis in axes)
    if owned:  # a row covers its blocks, so their old scales go
        scales = scatter_rows(scales, axes, blocks, jnp.zeros_like(candidates))
        scales = scatter_rows(scales, axes, blocks, candidates, lax.scatter_max)
        fitted = gather_rows(scales, axes, blocks)
    else:
        old = gather_rows(scales, axes, blocks)
        # The maximum changes nothing but the order: read before written, the scales need no copy.
        candidates = jnp.maximum(candidates, old)
        scales = scatter_rows(scales, axes, blocks, candidates, lax.scatter_max)
        fitted = gather_rows(scales, axes, blocks)
        codes = _grow(array, axes, blocks, old, fitted)
    new = jax.vmap(lambda row, scale: encode(row, scale, array.quantizer))(rows, fitted)
    return array.like(scatter_rows(codes, axes, index, new), scales)


def _grow(array: QuantizedArray, axes: Axes, blocks: jax.Array, old: jax.Array, new: jax.Array) -> jax.Array:
    """Codes with each touched block whose scale grew rescaled, once, however many rows touch it.

    A loop over chunks of distinct blocks: most writes grow few blocks, and a fresh page grows none.
    """
    grew = (old > 0) & (new > old)
    needs = grew.reshape(len(blocks), -1).any(axis=1)
    grid = tuple(array.scales.shape[axis] for axis in axes)
    distinct, first, steps, chunk = _distinct(blocks, needs, grid)

    def rescale(step, codes):
        at = lax.dynamic_slice_in_dim(distinct, step * chunk, chunk)
        row = lax.dynamic_slice_in_dim(first, step * chunk, chunk)
        windows = _gather_windows(codes, axes, at, array.block)
        grown = jax.vmap(lambda w, a, b: _grow_window(array, axes, w, a, b))(windows, old[row], new[row])
        return _scatter_windows(codes, axes, at, array.block, grown)

    return lax.fori_loop(jnp.int32(0), steps, rescale, array.codes)


def _distinct(blocks: jax.Array, needs: jax.Array, grid: Axes) -> tuple[jax.Array, jax.Array, jax.Array, int]:
    """Coordinates of the distinct needed blocks, a row that touches each, and how to walk over them.

    Unused places hold a coordinate past the end, which gathers and scatters drop.
    """
    rows = len(blocks)
    strides = [1]
    for extent in reversed(grid[1:]):
        strides.insert(0, strides[0] * extent)
    nowhere = grid[0] * strides[0]
    flat = jnp.where(needs, (blocks * jnp.array(strides, jnp.int32)).sum(axis=-1, dtype=jnp.int32), nowhere)
    order = jnp.argsort(flat).astype(jnp.int32)
    ascending = flat[order]
    is_first = jnp.append(True, ascending[1:] != ascending[:-1]) & (ascending < nowhere)
    chunk = min(rows, max(ROWS_AT_ONCE, rows // 8))
    padded = -(-rows // chunk) * chunk
    place = jnp.where(is_first, jnp.cumsum(is_first, dtype=jnp.int32) - 1, padded)
    first = jnp.zeros(padded, jnp.int32).at[place].set(order, mode="drop")
    found = jnp.full(padded, nowhere, jnp.int32).at[place].set(ascending, mode="drop")
    coordinates = [found // stride % extent for stride, extent in zip(strides[1:], grid[1:], strict=True)]
    steps = (jnp.sum(is_first, dtype=jnp.int32) + chunk - 1) // chunk
    return jnp.stack([found // strides[0], *coordinates], axis=-1), first, steps, chunk


def _grow_window(array: QuantizedArray, axes: Axes, window: jax.Array, old: jax.Array, new: jax.Array):
    """One block's codes, re-expressed under its new scale where that is larger and the block was in use."""
    old, new = jnp.expand_dims(old, axes), jnp.expand_dims(new, axes)
    quantizer, codes = array.quantizer, blocked(window, old.shape)
    grown = quantizer.grow(codes, beside(old), beside(new))
    return jnp.where(beside((old > 0) & (new > old)), grown, codes).reshape(window.shape)


def moves_whole_blocks(array: QuantizedArray, axes: Axes, rows: QuantizedArray) -> bool:
    """Whether ``rows`` are whole blocks of the same format, which move without being decoded."""
    whole = tuple(b for axis, b in enumerate(array.block) if axis not in axes)
    owned = all(array.block[axis] == 1 for axis in axes)
    return owned and rows.quantizer == array.quantizer and rows.block[1:] == whole


def move_rows(array: QuantizedArray, axes: Axes, index: jax.Array, rows: QuantizedArray) -> QuantizedArray:
    """Rows of the same format, codes and scales moved together."""
    return jax.tree_util.tree_map(
        lambda operand, updates: scatter_rows(operand, axes, index, updates),
        array,
        array.like(rows.codes, rows.scales, rows.offsets),
    )


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


def _gather_windows(codes, axes: Axes, blocks: jax.Array, block: Sequence[int]) -> jax.Array:
    """(rows, *window): the codes of whole blocks along ``axes``, of everything along the others."""
    numbers = lax.GatherDimensionNumbers(
        offset_dims=tuple(range(1, 1 + codes.ndim)), collapsed_slice_dims=(), start_index_map=axes
    )
    sizes = tuple(block[axis] if axis in axes else n for axis, n in enumerate(codes.shape))
    starts = blocks * jnp.array([block[axis] for axis in axes], jnp.int32)
    mode = lax.GatherScatterMode.FILL_OR_DROP
    return lax.gather(codes, starts, numbers, sizes, mode=mode, fill_value=0)


def _scatter_windows(codes, axes: Axes, blocks: jax.Array, block: Sequence[int], windows) -> jax.Array:
    numbers = lax.ScatterDimensionNumbers(
        update_window_dims=tuple(range(1, windows.ndim)),
        inserted_window_dims=(),
        scatter_dims_to_operand_dims=axes,
    )
    starts = blocks * jnp.array([block[axis] for axis in axes], jnp.int32)
    mode = lax.GatherScatterMode.FILL_OR_DROP
    return lax.scatter(codes, starts, windows, numbers, mode=mode)
