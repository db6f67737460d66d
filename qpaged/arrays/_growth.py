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
    """What is newly written to each distinct block: the scales that fit it alone, and its extremes.

    Each is (entries, *scales of the kept axes), an entry for each distinct block.
    """

    fresh_scales: jax.Array
    low: jax.Array
    high: jax.Array


class GrowingBlocks(NamedTuple):
    """The blocks that grow, to be walked over in chunks.

    Attributes:
        entries: (padded,) int32; which of the distinct blocks grow. The rest is filled with their number,
            which scatters drop.
        steps: () int32; the number of chunks in which any block grows.
        chunk: the length of a chunk.
    """

    entries: jax.Array
    steps: jax.Array
    chunk: int

    def of_step(self, step: jax.Array) -> jax.Array:
        """Return the entries of a chunk, (chunk,)."""
        return lax.dynamic_slice_in_dim(self.entries, step * self.chunk, self.chunk)


def growth_rule(array: QuantizedArray) -> GrowthRule:
    """Return how the array's shared scales grow; callers have made sure that they can."""
    rule = array.quantizer.growth
    assert rule is not None
    return rule


def grow_blocks(
    array: QuantizedArray,
    axes: Axes,
    blocks: jax.Array,  # [entries, len(axes)], distinct
    new: NewExtremes,
) -> tuple[jax.Array, jax.Array]:
    """Return the codes of ``array`` and the scales of ``blocks``, grown to hold new extremes.

    Blocks whose scale is 0, to which nothing but zeros was written, get their fresh scales. The others keep
    theirs if these cover the new values; else they are fitted again, and their codes requantized.
    Requantizing is a loop over chunks, since most writes grow few blocks and a fresh page grows none.
    """
    old = gather_rows(array.block_scales, axes, blocks)
    in_use = old != 0
    grows = in_use & ~growth_rule(array).covers(old, new.low, new.high)
    growing = _growing_blocks(grows)
    # Gathers fill and scatters drop what is past the end.
    past_end = jnp.array([array.block_scales.shape[axis] for axis in axes], jnp.int32)

    def requantize_chunk(step: jax.Array, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        codes, scales = state
        entry = growing.of_step(step)
        is_padding = (entry == len(blocks))[:, None]
        block_index = jnp.where(is_padding, past_end, blocks.at[entry].get(mode="clip"))
        windows = gather_blocks(codes, axes, array.block, block_index)
        windows, grown = _grow_windows(array, axes, windows, scales, grows, new, entry)
        codes = scatter_blocks(codes, axes, array.block, block_index, windows)
        return codes, scales.at[entry].set(grown, mode="drop")

    state = array.codes, jnp.where(in_use, old, new.fresh_scales)
    return lax.fori_loop(jnp.int32(0), growing.steps, requantize_chunk, state)


def _growing_blocks(grows: jax.Array) -> GrowingBlocks:
    """Return the entries of which any block grows, in chunks of an eighth of all entries, MIN_CHUNK at least.

    All of them take about eight steps then, and a few of them one.
    """
    any_grows = grows.reshape(len(grows), -1).any(axis=1)
    entries = len(any_grows)
    chunk = min(entries, max(MIN_CHUNK, entries // 8))
    padded = -(-entries // chunk) * chunk
    target = jnp.where(any_grows, jnp.cumsum(any_grows, dtype=jnp.int32) - 1, padded)
    chosen = jnp.full(padded, entries, jnp.int32)
    chosen = chosen.at[target].set(jnp.arange(entries, dtype=jnp.int32), mode="drop")
    steps = (jnp.sum(any_grows, dtype=jnp.int32) + chunk - 1) // chunk
    return GrowingBlocks(chosen, steps, chunk)


def _grow_windows(
    array: QuantizedArray,
    axes: Axes,
    windows: jax.Array,  # [chunk, *window]
    scales: jax.Array,  # [entries, *scales of the kept axes]
    grows: jax.Array,  # as scales, bool
    new: NewExtremes,
    entry: jax.Array,  # [chunk]
) -> tuple[jax.Array, jax.Array]:
    """Return the codes and scales of a chunk of windows, requantized where they grow."""

    def grow_one(
        window: jax.Array, old: jax.Array, grows: jax.Array, low: jax.Array, high: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        return _grow_window(array, axes, window, old, grows, low, high)

    old = scales.at[entry].get(mode="clip")  # padding reads the last entry, and is dropped when it is written
    return jax.vmap(grow_one)(windows, old, grows[entry], new.low[entry], new.high[entry])


def _grow_window(
    array: QuantizedArray,
    axes: Axes,
    window: jax.Array,  # a block's extents along axes, everything along the others
    old: jax.Array,  # [*scales of the kept axes], and so the next three
    grows: jax.Array,
    low: jax.Array,
    high: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Return one window, with the blocks in it that grow requantized under new scales.

    Blocks whose scale covers the new values stay as they are, and so do those that nothing is written to.
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
    pages: jax.Array,  # [entries], each one block along the slots
    old: jax.Array,  # [entries, kv_heads, channels or 1]
    new: NewExtremes,
) -> jax.Array:
    """Return the scales that :func:`grow_blocks` would; a kernel requantizes the codes.

    Windows are gathered for their greatest code alone. What :func:`_grow_windows` makes of their codes is not
    used, and XLA removes it.
    """
    in_use = old != 0
    grows = in_use & ~growth_rule(array).covers(old, new.low, new.high)
    growing = _growing_blocks(grows)

    def fit_chunk(step: jax.Array, scales: jax.Array) -> jax.Array:
        entry = growing.of_step(step)
        windows = gather_page_windows(array, pages.at[entry].get(mode="clip"))
        _, grown = _grow_windows(array, (1, 2), windows, scales, grows, new, entry)
        return scales.at[entry].set(grown, mode="drop")

    scales = jnp.where(in_use, old, new.fresh_scales)
    return lax.fori_loop(jnp.int32(0), growing.steps, fit_chunk, scales)
