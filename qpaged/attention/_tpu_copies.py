"""The copies of pages and scales from HBM to the chip, in the kernel of the ``tpu`` backend.

The pages of a tile are copied one by one, as the page table in scalar memory says, all KV heads of a page at
once. Two buffers alternate: a tile is copied into one while the tile before is computed with from the other.
The first tile of the next query tile is copied during the last one of this query tile.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from qpaged.attention._tpu_refs import Index, Refs


def visible_kv_tiles(refs: Refs, q_tile_index: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the first tile of keys and values that a query tile sees, and one past the last.

    There is at least one, because the copies of a tile are started during the one before.
    """
    kv_tile = refs.call.kv_tile
    first = lax.div(refs.first_visible(q_tile_index), kv_tile)
    return first, jnp.maximum(lax.div(refs.last_visible(q_tile_index), kv_tile), first) + 1


def _physical_page(
    refs: Refs, q_tile_index: jax.Array, logical_page: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Return a sequence's page in the pool, and True if it exists and any query of the tile sees it."""
    call = refs.call
    page = refs.table[refs.sequence(q_tile_index) * call.table_pages + logical_page]
    page_size = call.keys.page_size
    visible = logical_page >= lax.div(refs.first_visible(q_tile_index), page_size)
    visible &= logical_page * page_size <= refs.last_visible(q_tile_index)
    return page, visible & (page >= 0) & (page < call.options.num_pages)


def start_copies(refs: Refs, q_tile_index: jax.Array, kv_tile_index: jax.Array, buffer_index: Index) -> None:
    """Start the copies of a tile of keys and values. Values that are not copied become zeros."""
    call, keys, values = refs.call, refs.keys, refs.values
    for kv in (keys, values):
        if kv.pool.scales is not None:
            kv.scale_copy(refs.sequence(q_tile_index), kv_tile_index, buffer_index).start()

    def start_page(page_index: jax.Array, _: None) -> None:
        logical_page = kv_tile_index * call.pages_per_tile + page_index
        page, is_copied = _physical_page(refs, q_tile_index, logical_page)

        @pl.when(is_copied)
        def start() -> None:
            keys.page_copy(page, buffer_index, page_index).start()
            values.page_copy(page, buffer_index, page_index).start()

        # What the buffer held before may be NaN, which a weight of zero would not hide.
        @pl.when(jnp.logical_not(is_copied))
        def clear() -> None:
            pages = values.buffers.pages
            pages[buffer_index, page_index] = jnp.zeros(pages.shape[2:], pages.dtype)

    lax.fori_loop(0, call.pages_per_tile, start_page, None)


def start_next_copies(refs: Refs, kv_tile_index: jax.Array, end: jax.Array, buffer_index: jax.Array) -> None:
    """Start the copies of the tile after this one, to the other buffer.

    After the last tile of a query tile comes the first one of the next query tile.
    """
    same_q_tile = kv_tile_index + 1 < end
    following = jnp.minimum(refs.q_tile_index + 1, refs.call.num_q_tiles - 1)
    q_tile_index = jnp.where(same_q_tile, refs.q_tile_index, following)
    next_tile = jnp.where(same_q_tile, kv_tile_index + 1, visible_kv_tiles(refs, q_tile_index)[0])

    @pl.when(same_q_tile | (refs.q_tile_index + 1 < refs.call.num_q_tiles))
    def start() -> None:
        start_copies(refs, q_tile_index, next_tile, 1 - buffer_index)


def wait_for_copies(refs: Refs, kv_tile_index: jax.Array, buffer_index: jax.Array) -> None:
    """Wait for the copies that :func:`start_copies` started for a tile of this query tile."""
    call, keys, values = refs.call, refs.keys, refs.values
    for kv in (keys, values):
        if kv.pool.scales is not None:
            kv.scale_copy(refs.sequence(refs.q_tile_index), kv_tile_index, buffer_index).wait()

    def wait_for_page(page_index: jax.Array, _: None) -> None:
        logical_page = kv_tile_index * call.pages_per_tile + page_index
        page, is_copied = _physical_page(refs, refs.q_tile_index, logical_page)

        @pl.when(is_copied)
        def wait() -> None:
            keys.page_copy(page, buffer_index, page_index).wait()
            values.page_copy(page, buffer_index, page_index).wait()

    lax.fori_loop(0, call.pages_per_tile, wait_for_page, None)


def copied_rows(refs: Refs, kv_tile_index: jax.Array) -> jax.Array:
    """Return [1, rows] of keys, True where the row's page was copied."""
    call = refs.call
    shape = 1, call.pages_per_tile * call.keys.page_rows
    page_of_row = lax.div(lax.broadcasted_iota(jnp.int32, shape, 1), call.keys.page_rows)

    def mark_page(page_index: jax.Array, copied: jax.Array) -> jax.Array:
        logical_page = kv_tile_index * call.pages_per_tile + page_index
        _, is_copied = _physical_page(refs, refs.q_tile_index, logical_page)
        return jnp.where(page_of_row == page_index, is_copied.astype(jnp.int32), copied)

    return lax.fori_loop(0, call.pages_per_tile, mark_page, jnp.zeros(shape, jnp.int32)) > 0
