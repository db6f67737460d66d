"""Shared scales that grow: blocks are fitted again, and their codes requantized, where new values need it."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from qpaged.arrays._blocks import block_max, expand_scales, split_blocks
from qpaged.arrays._packing import pack, unpack
from qpaged.arrays._protocol import GrowthRule
from qpaged.arrays._quantized import QuantizedArray
from qpaged.arrays._scatter import Axes, gather_blocks, gather_rows, scatter_blocks
from qpaged.arrays._tpu_write import gather_page_windows

MIN_CHUNK = 64  # blocks that one step of the growth loop rescales, at least


class NewExtremes(NamedTuple):
    """What is written to distinct blocks: scales that fit it alone, and its least and greatest values.

    Each is (rows, *scales of the kept axes).
    """

    fresh_scales: jax.Array
    low: jax.Array
    high: jax.Array


class GrowingBlocks(NamedTuple):
    """The blocks that grow, to be walked over in chunks.

    Attributes:
        rows: (padded,) int32; the rows of blocks that grow, then the number of rows.
        steps: () int32; chunks that hold any.
        chunk: rows of a chunk.
    """

    rows: jax.Array
    steps: jax.Array
    chunk: int

    def of_step(self, step: jax.Array) -> jax.Array:
        return lax.dynamic_slice_in_dim(self.rows, step * self.chunk, self.chunk)


def growth_rule(array: QuantizedArray) -> GrowthRule:
    """Return how the array's shared scales grow; callers have made sure that they can."""
    rule = array.quantizer.growth
    assert rule is not None
    return rule


def grow_blocks(
    array: QuantizedArray,
    axes: Axes,
    blocks: jax.Array,  # [rows, len(axes)], distinct
    new: NewExtremes,
) -> tuple[jax.Array, jax.Array]:
    """Return the codes of ``array`` and the scales of ``blocks``, grown to hold new extremes.

    Blocks in which nothing was written get their fresh scales. The others keep theirs if these cover the new
    values; those that do not are fitted again, and their codes requantized. That is a loop over chunks, since
    most writes grow few blocks and a fresh page grows none.
    """
    old = gather_rows(array.block_scales, axes, blocks)
    in_use = old != 0
    grows = in_use & ~growth_rule(array).covers(old, new.low, new.high)
    growing = _growing_blocks(grows)
    past_end = jnp.array([array.block_scales.shape[axis] for axis in axes], jnp.int32)

    def requantize_chunk(step: jax.Array, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        codes, scales = state
        row = growing.of_step(step)
        in_chunk = (row < len(blocks))[:, None]
        block_index = jnp.where(in_chunk, blocks.at[row].get(mode="clip"), past_end)
        windows = gather_blocks(codes, axes, array.block, block_index)
        windows, grown = _grow_windows(array, axes, windows, scales, grows, new, row)
        codes = scatter_blocks(codes, axes, array.block, block_index, windows)
        return codes, scales.at[row].set(grown, mode="drop")

    state = array.codes, jnp.where(in_use, old, new.fresh_scales)
    return lax.fori_loop(jnp.int32(0), growing.steps, requantize_chunk, state)


def _growing_blocks(grows: jax.Array) -> GrowingBlocks:
    """Return which rows have any block that grows."""
    any_grows = grows.reshape(len(grows), -1).any(axis=1)
    rows = len(any_grows)
    chunk = min(rows, max(MIN_CHUNK, rows // 8))
    padded = -(-rows // chunk) * chunk
    target = jnp.where(any_grows, jnp.cumsum(any_grows, dtype=jnp.int32) - 1, padded)
    chosen = jnp.full(padded, rows, jnp.int32)
    chosen = chosen.at[target].set(jnp.arange(rows, dtype=jnp.int32), mode="drop")
    steps = (jnp.sum(any_grows, dtype=jnp.int32) + chunk - 1) // chunk
    return GrowingBlocks(chosen, steps, chunk)


def _grow_windows(
    array: QuantizedArray,
    axes: Axes,
    windows: jax.Array,  # [chunk, *window]
    scales: jax.Array,
    grows: jax.Array,
    new: NewExtremes,
    row: jax.Array,  # [chunk]
) -> tuple[jax.Array, jax.Array]:
    """Return the codes and scales of a chunk of windows, requantized where they grow."""

    def grow_one(window, old, grows, low, high):
        return _grow_window(array, axes, window, old, grows, low, high)

    old = scales.at[row].get(mode="clip")
    return jax.vmap(grow_one)(windows, old, grows[row], new.low[row], new.high[row])


def _grow_window(
    array: QuantizedArray,
    axes: Axes,
    window: jax.Array,
    old: jax.Array,
    grows: jax.Array,
    low: jax.Array,
    high: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Return one window of blocks with those that grow requantized under new scales, the others left.

    Left are blocks that cover the new values, and, beside them, those that nothing was written to.
    """
    quantizer, rule = array.quantizer, growth_rule(array)
    codes = unpack(window, quantizer.bits, array.channel_axis, quantizer.code_dtype(array.dtype))
    grid = tuple(1 if axis in axes else count for axis, count in enumerate(array.block_scales.shape))
    old, grows = old.reshape(grid), grows.reshape(grid)
    fitted = rule.grown_scale(old, block_max(codes, grid), low.reshape(grid), high.reshape(grid))
    scales = jnp.where(grows, fitted, old)
    blocks = split_blocks(codes, grid)
    requantized = rule.requantize(blocks, expand_scales(old), expand_scales(scales))
    blocks = jnp.where(expand_scales(grows), requantized, blocks)
    packed = pack(blocks.reshape(codes.shape), quantizer.bits, array.channel_axis)
    kept = [count for axis, count in enumerate(grid) if axis not in axes]
    return packed, scales.reshape(kept)


def grow_page_scales(
    array: QuantizedArray,
    pages: jax.Array,  # [rows]
    old: jax.Array,  # [rows, kv_heads, channels or 1]
    new: NewExtremes,
) -> jax.Array:
    """Return the scales that :func:`grow_blocks` would; a kernel requantizes the codes."""
    in_use = old != 0
    grows = in_use & ~growth_rule(array).covers(old, new.low, new.high)
    growing = _growing_blocks(grows)

    def fit_chunk(step: jax.Array, scales: jax.Array) -> jax.Array:
        row = growing.of_step(step)
        windows = gather_page_windows(array, pages.at[row].get(mode="clip"))
        _, grown = _grow_windows(array, (1, 2), windows, scales, grows, new, row)
        return scales.at[row].set(grown, mode="drop")

    scales = jnp.where(in_use, old, new.fresh_scales)
    return lax.fori_loop(jnp.int32(0), growing.steps, fit_chunk, scales)
