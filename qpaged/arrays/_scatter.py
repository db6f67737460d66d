"""Rows in and out of one plain array, at coordinates along some of its axes.

Every write is brought to one form: the operand's axes are *indexed* (each row names a coordinate) or *kept*
(each row covers them). Rows are (rows, *kept extents); a row with any coordinate out of range, negative
included, is dropped.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.lax import GatherDimensionNumbers, GatherScatterMode, ScatterDimensionNumbers

Axes = tuple[int, ...]
DROP = GatherScatterMode.FILL_OR_DROP


def scatter_rows(
    operand: jax.Array,
    axes: Axes,
    index: jax.Array,  # [rows, len(axes)]
    rows: jax.Array,  # [rows, *kept extents]
) -> jax.Array:
    """Return ``operand`` with ``rows`` put at ``index`` along ``axes``; out of range is dropped."""
    numbers = ScatterDimensionNumbers(
        update_window_dims=tuple(range(1, rows.ndim)),
        inserted_window_dims=axes,
        scatter_dims_to_operand_dims=axes,
    )
    return lax.scatter(operand, index, rows.astype(operand.dtype), numbers, mode=DROP)


def scatter_heads(
    operand: jax.Array,  # [kv_heads, pages, page_size, head_dim]
    index: jax.Array,  # [rows, 2], page and slot
    rows: jax.Array,  # [rows, kv_heads, head_dim]
) -> jax.Array:
    """Return what :func:`scatter_rows` does of a pool, by a row for each head.

    For rows of all heads XLA on TPUs may lay a pool out anew, heads inmost, at every step of a loop.
    """
    heads, pages, page_size, head_dim = operand.shape
    page, slot = index[:, 0], index[:, 1]
    inside = (page >= 0) & (page < pages) & (slot >= 0) & (slot < page_size)
    head_start = jnp.arange(heads, dtype=jnp.int32) * (pages * page_size)
    target = head_start + (page * page_size + slot)[:, None]  # [rows, kv_heads]
    target = jnp.where(inside[:, None], target, heads * pages * page_size)
    flat = operand.reshape(-1, head_dim)
    return flat.at[target].set(rows, mode="drop").reshape(operand.shape)


def gather_rows(
    operand: jax.Array,
    axes: Axes,
    index: jax.Array,  # [rows, len(axes)]
) -> jax.Array:
    """Return the rows [rows, *kept extents] at ``index`` along ``axes``; zeros where that is out of range."""
    kept = operand.ndim - len(axes)
    numbers = GatherDimensionNumbers(
        offset_dims=tuple(range(1, 1 + kept)), collapsed_slice_dims=axes, start_index_map=axes
    )
    sizes = tuple(1 if axis in axes else length for axis, length in enumerate(operand.shape))
    return lax.gather(operand, index, numbers, sizes, mode=DROP, fill_value=0)


def gather_blocks(
    operand: jax.Array,
    axes: Axes,
    block: Sequence[int],
    block_index: jax.Array,  # [rows, len(axes)]
) -> jax.Array:
    """Return (rows, *extents): whole blocks along ``axes``, and everything along the others."""
    numbers = GatherDimensionNumbers(
        offset_dims=tuple(range(1, 1 + operand.ndim)), collapsed_slice_dims=(), start_index_map=axes
    )
    sizes = tuple(block[axis] if axis in axes else length for axis, length in enumerate(operand.shape))
    starts = block_index * _extents(block, axes)
    return lax.gather(operand, starts, numbers, sizes, mode=DROP, fill_value=0)


def scatter_blocks(
    operand: jax.Array,
    axes: Axes,
    block: Sequence[int],
    block_index: jax.Array,  # [rows, len(axes)]
    blocks: jax.Array,  # as gather_blocks returns them
) -> jax.Array:
    """Return ``operand`` with ``blocks`` put where :func:`gather_blocks` took them from."""
    numbers = ScatterDimensionNumbers(
        update_window_dims=tuple(range(1, blocks.ndim)),
        inserted_window_dims=(),
        scatter_dims_to_operand_dims=axes,
    )
    return lax.scatter(operand, block_index * _extents(block, axes), blocks, numbers, mode=DROP)


def _extents(block: Sequence[int], axes: Axes) -> jax.Array:
    return jnp.array([block[axis] for axis in axes], jnp.int32)


def group_by_block(
    blocks: jax.Array,  # [rows, axes]
    grid: Axes,
) -> tuple[jax.Array, jax.Array]:
    """Return the distinct blocks among ``blocks``, and for each row the index of the one that it is in.

    Rows that are out of range, negative ones included, are in a block past the end. So are the unused entries
    of the first result, which has as many as there are rows; gathers and scatters drop them.

    Returns:
        distinct: (rows, axes) int32, ascending.
        block_of_row: (rows,) int32.
    """
    strides = _row_major_strides(grid)
    past_end = grid[0] * strides[0]
    inside = jnp.all((blocks >= 0) & (blocks < jnp.array(grid, jnp.int32)), axis=-1)
    flat = (blocks * jnp.array(strides, jnp.int32)).sum(axis=-1, dtype=jnp.int32)
    flat = jnp.where(inside, flat, past_end)
    order = jnp.argsort(flat)
    ascending = flat[order]
    is_new = jnp.append(jnp.zeros(1, bool), ascending[1:] != ascending[:-1])
    group = jnp.cumsum(is_new, dtype=jnp.int32)
    block_of_row = jnp.zeros(flat.shape[0], jnp.int32).at[order].set(group)
    distinct = jnp.full(flat.shape[0], past_end, jnp.int32).at[group].set(ascending)
    # The leading coordinate is not taken modulo its extent: past the end it stays there.
    coordinates = [distinct // strides[0]]
    for stride, extent in zip(strides[1:], grid[1:], strict=True):
        coordinates.append(distinct // stride % extent)
    return jnp.stack(coordinates, axis=-1), block_of_row


def _row_major_strides(grid: Axes) -> list[int]:
    strides = [1]
    for extent in reversed(grid[1:]):
        strides.insert(0, strides[0] * extent)
    return strides
