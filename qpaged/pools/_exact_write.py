"""Writes to a pool with exact pages: which pages become exact, which are packed, and where rows go."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax import lax

from qpaged import arrays
from qpaged.arrays import QuantizedArray
from qpaged.pools._pool import SlotMapping

if TYPE_CHECKING:
    from qpaged.pools._exact import ExactPages


def gather(pool: QuantizedArray, indices: jax.Array) -> jax.Array:
    """Return the slots (kv_heads, n * page_size, head_dim) of pages (n,), decoded; any out of range."""
    slots = arrays.as_slots(arrays.read_pages(pool, indices))
    assert isinstance(slots, QuantizedArray)
    return slots.materialize()


def write(
    pool: ExactPages,
    mapping: SlotMapping,  # of [tokens]
    rows: jax.Array,  # [tokens, kv_heads, head_dim]
) -> ExactPages:
    """Return a pool with rows written to exact pages; pages that their sequences leave behind are packed.

    Pages that a call opens and leaves behind go straight to the codes, and so do those that there is no room
    for.
    """
    assert mapping.logical_page is not None and mapping.page_table is not None  # as the pool has checked
    num_pages, page_size = pool.shape[1:3]
    in_pool = (mapping.page >= 0) & (mapping.page < num_pages)
    page = jnp.where(in_pool, mapping.page, num_pages)
    rows = rows.astype(pool.dtype)
    number = pool.find(page)
    is_written = _mark(number, pool.capacity)
    is_behind, leaves = _left_behind(pool, mapping, page)
    is_behind |= leaves.at[number].get(mode="fill", fill_value=False)  # through another sequence's table, too
    opens = in_pool & (number == pool.capacity) & ~is_behind
    rank, is_first = _distinct(page, opens, num_pages)
    leaves |= _packed_early(pool, leaves, is_written, needed=is_first.sum(dtype=jnp.int32))
    places, count = _free_places(pool, leaves)
    has_room = opens & (rank < count)
    place = jnp.where(has_room, places[jnp.minimum(rank, pool.capacity - 1)], number)
    place = jnp.where(is_behind, pool.capacity, place)
    is_never_exact = in_pool & (number == pool.capacity) & (place == pool.capacity)
    _, is_first_direct = _distinct(page, is_never_exact, num_pages)
    pool = _pack(pool, leaves, page, mapping.slot, rows, is_first_direct)
    first_place = jnp.where(is_first & has_room, place, pool.capacity)
    pool = _open(pool, page, first_place, rank, mapping.logical_page < pool.sinks)
    is_full = pool.is_full.at[place].max(mapping.slot == page_size - 1, mode="drop")
    written = arrays.write_rows(pool.rows, (1, 2), (place, mapping.slot), rows)
    return dataclasses.replace(pool, rows=written, is_full=is_full)


def _mark(numbers: jax.Array, count: int, where: jax.Array | None = None) -> jax.Array:
    """Return (count,) bool, True at the numbers, of any shape, ``where`` that holds."""
    numbers = numbers if where is None else jnp.where(where, numbers, count)
    return jnp.zeros(count, bool).at[numbers.reshape(-1)].set(True, mode="drop")


def _left_behind(
    pool: ExactPages,
    mapping: SlotMapping,
    page: jax.Array,  # [tokens]
) -> tuple[jax.Array, jax.Array]:
    """Return which tokens are of pages that are left behind [tokens], and which exact pages are.

    A sequence leaves behind the pages before its newest ``window`` ones, but for its first ``sinks``.
    """
    assert mapping.logical_page is not None and mapping.page_table is not None  # as the pool has checked
    if not mapping.page_table.size:
        return jnp.zeros(page.shape, bool), jnp.zeros(pool.capacity, bool)
    logical_page = jnp.where(page < pool.shape[1], mapping.logical_page, -1)
    table = mapping.page_table  # [sequences, pages]
    newest = _newest(logical_page, mapping.sequence, len(table))
    place = jnp.arange(table.shape[1], dtype=jnp.int32)
    is_active = newest[:, None] >= 0
    is_before = is_active & (place >= pool.sinks) & (place <= newest[:, None] - pool.window)
    leaves = _mark(pool.find(table), pool.capacity, is_before)
    place_of_token = jnp.clip(logical_page, 0, table.shape[1] - 1)
    is_behind = is_before[:, place_of_token] & (table[:, place_of_token] == page)  # [sequences, tokens]
    return is_behind.any(axis=0), leaves


def _newest(logical_page: jax.Array, sequence: jax.Array | None, sequences: int) -> jax.Array:
    """Return the last logical page [sequences] to which each sequence's tokens go; negative if none do."""
    if sequence is not None:
        return jax.ops.segment_max(logical_page, sequence, sequences)
    return logical_page.max(keepdims=True) if sequences == 1 else logical_page


def _distinct(page: jax.Array, where: jax.Array, num_pages: int) -> tuple[jax.Array, jax.Array]:
    """Return the rank of each token's page among the distinct ones ``where`` that holds, and their firsts.

    Returns:
        rank: (tokens,) int32; past the others where it does not hold.
        is_first: (tokens,) bool; True for one token of each page.
    """
    key = jnp.where(where, page, num_pages)
    order = jnp.argsort(key)
    ascending = key[order]
    is_new = jnp.concatenate([jnp.ones(1, bool), ascending[1:] != ascending[:-1]])
    rank = jnp.zeros_like(key).at[order].set(jnp.cumsum(is_new, dtype=jnp.int32) - 1)
    is_first = jnp.zeros_like(where).at[order].set(is_new)
    return rank, is_first & where


def _packed_early(pool: ExactPages, leaves: jax.Array, is_written: jax.Array, needed: jax.Array) -> jax.Array:
    """Return which exact pages are packed to make room: full ones that were opened first, then open ones."""
    is_used = (pool.page < pool.shape[1]) & ~leaves
    can_go = is_used & ~is_written
    shortage = needed - (~is_used).sum(dtype=jnp.int32)
    order = jnp.lexsort((pool.opened, ~pool.is_full, pool.is_sink, ~can_go))
    rank = jnp.zeros(pool.capacity, jnp.int32).at[order].set(jnp.arange(pool.capacity, dtype=jnp.int32))
    return can_go & (rank < shortage)


def _free_places(pool: ExactPages, leaves: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the numbers of all exact pages, free ones first, and how many are free."""
    is_free = leaves | (pool.page == pool.shape[1])
    return jnp.argsort(~is_free).astype(jnp.int32), is_free.sum(dtype=jnp.int32)


def _pack(
    pool: ExactPages,
    leaves: jax.Array,  # [exact pages]
    page: jax.Array,  # [tokens]
    slot: jax.Array,  # [tokens]
    rows: jax.Array,  # [tokens, kv_heads, head_dim]
    is_direct: jax.Array,  # [tokens]
) -> ExactPages:
    """Return a pool with the exact pages packed that leave, and with rows of pages that are never exact.

    It loops over the pages that are packed: where none is, no work of a page's size is done.
    """
    page_size, tokens = pool.shape[2], len(page)
    is_packed = jnp.concatenate([leaves, is_direct])
    order = jnp.argsort(~is_packed)
    pages = jnp.concatenate([pool.page, page])

    def pack_one(index: jax.Array, codes: arrays.QuantizedArray) -> arrays.QuantizedArray:
        number = order[index]
        target = pages[number][None]
        # A branch: XLA on CPU would fuse the read into the writes, and copy all scales to keep them apart.
        before = lax.cond(
            number < pool.capacity,
            lambda: gather(pool.rows, number[None]),
            lambda: gather(codes, target),
        )
        slots = jnp.where(page == target, slot, page_size)
        token = jnp.full(page_size, -1, jnp.int32).at[slots].max(jnp.arange(tokens, dtype=jnp.int32))
        content = jnp.where((token >= 0)[:, None], rows[token].swapaxes(0, 1), before)
        return arrays.put_pages(codes, content[:, None], target)

    codes = lax.fori_loop(0, is_packed.sum(dtype=jnp.int32), pack_one, pool.codes)
    return _freed(dataclasses.replace(pool, codes=codes), leaves)


def _freed(pool: ExactPages, leaves: jax.Array) -> ExactPages:
    """Return a pool in which the numbers that leave are free."""
    return dataclasses.replace(
        pool,
        page=jnp.where(leaves, pool.shape[1], pool.page),
        is_full=pool.is_full & ~leaves,
        is_sink=pool.is_sink & ~leaves,
    )


def _open(
    pool: ExactPages,
    page: jax.Array,  # [tokens]
    place: jax.Array,  # [tokens]; one token of each page that becomes exact has its number, others capacity
    rank: jax.Array,  # [tokens]
    is_sink: jax.Array,  # [tokens]
) -> ExactPages:
    """Return a pool in which pages are exact at free places; they hold what their codes say."""
    opens = place < pool.capacity
    order = jnp.argsort(~opens)

    def open_one(index: jax.Array, rows: arrays.QuantizedArray) -> arrays.QuantizedArray:
        token = order[index][None]
        content = gather(pool.codes, page[token])[:, None]
        return arrays.put_pages(rows, content, place[token])

    return dataclasses.replace(
        pool,
        rows=lax.fori_loop(0, opens.sum(dtype=jnp.int32), open_one, pool.rows),
        page=pool.page.at[place].set(page, mode="drop"),
        opened=pool.opened.at[place].set(pool.opened.max() + 1 + rank, mode="drop"),
        is_sink=pool.is_sink.at[place].set(is_sink, mode="drop"),
    )


def _pages(pool: ExactPages, numbers: jax.Array) -> jax.Array:
    """Return exact pages [kv_heads, n, page_size, head_dim] by their numbers (n,); zeros out of range."""
    kv_heads, _, page_size, head_dim = pool.shape
    return gather(pool.rows, numbers).reshape(kv_heads, len(numbers), page_size, head_dim)


def clear_pages(pool: ExactPages, indices: jax.Array) -> ExactPages:
    """Return a pool with fresh pages at ``indices``, none of them exact."""
    leaves = _mark(pool.find(indices), pool.capacity)
    return _freed(dataclasses.replace(pool, codes=arrays.clear_pages(pool.codes, indices)), leaves)


def pack_pages(
    pool: ExactPages,
    indices: jax.Array,  # [n]
    lengths: jax.Array,  # [n]
) -> ExactPages:
    """Return a pool with the exact pages among ``indices`` packed; slots from ``lengths`` on are zeros."""
    num_pages, page_size = pool.shape[1:3]
    number = pool.find(indices)
    is_kept = jnp.arange(page_size, dtype=jnp.int32)[None] < lengths[:, None]
    content = jnp.where(is_kept[None, :, :, None], _pages(pool, number), jnp.zeros((), pool.dtype))
    target = arrays.final_targets(indices, jnp.where(number < pool.capacity, indices, num_pages), num_pages)
    packed = dataclasses.replace(pool, codes=arrays.put_pages(pool.codes, content, target))
    return _freed(packed, _mark(number, pool.capacity))


def take_pages(
    pool: ExactPages,
    indices: jax.Array,  # [n]
    capacity: int,
) -> ExactPages:
    """Return pages as a pool of their own, with room for ``capacity`` exact ones; others are packed in it."""
    count = len(indices)
    number = pool.find(indices)
    is_exact = number < pool.capacity
    opened, is_full, is_sink = (_of_exact(part, number) for part in (pool.opened, pool.is_full, pool.is_sink))
    order = _by_precedence(is_exact, opened, is_full, is_sink)
    rank = _rank_of(order)
    codes = arrays.read_pages(pool.codes, indices)
    if capacity < count:
        is_packed = is_exact & (rank >= capacity)
        targets = jnp.where(is_packed, jnp.arange(count, dtype=jnp.int32), count)
        codes = arrays.put_pages(codes, _pages(pool, number), targets)
    place = jnp.arange(capacity, dtype=jnp.int32)
    page = order.at[place].get(mode="fill", fill_value=0)
    is_used = place < is_exact.sum(dtype=jnp.int32)
    number = jnp.where(is_used, number[page], pool.capacity)
    return dataclasses.replace(
        pool,
        codes=codes,
        rows=arrays.read_pages(pool.rows, number),
        page=jnp.where(is_used, page, count),
        opened=_of_exact(pool.opened, number),
        is_full=_of_exact(pool.is_full, number),
        is_sink=_of_exact(pool.is_sink, number),
    )


def _of_exact(part: jax.Array, number: jax.Array) -> jax.Array:
    """Return what is noted of exact pages, by their numbers; 0 or False out of range."""
    return part.at[number].get(mode="fill", fill_value=0)


def _rank_of(order: jax.Array) -> jax.Array:
    """Return the place of each element in an order of all."""
    return jnp.zeros_like(order).at[order].set(jnp.arange(len(order), dtype=order.dtype))


def _by_precedence(
    is_exact: jax.Array, opened: jax.Array, is_full: jax.Array, is_sink: jax.Array
) -> jax.Array:
    """Return the order in which pages stay exact: what would be packed last comes first."""
    return jnp.lexsort((-opened, is_full, ~is_sink, ~is_exact)).astype(jnp.int32)


def put_pages(
    pool: ExactPages,
    taken: ExactPages,  # of n pages
    target: jax.Array,  # [n]
) -> ExactPages:
    """Return a pool with pages of another: exact ones at free places, or packed where there are none."""
    num_pages, capacity = pool.shape[1], pool.capacity
    count, most = taken.shape[1], taken.capacity
    target = arrays.final_targets(jnp.arange(count, dtype=jnp.int32), target, num_pages, count)
    codes = arrays.put_pages(pool.codes, taken.codes, target)
    pool = _freed(dataclasses.replace(pool, codes=codes), _mark(pool.find(target), capacity))
    page = target.at[taken.page].get(mode="fill", fill_value=num_pages)  # of each exact page
    is_exact = page < num_pages
    order = _by_precedence(is_exact, taken.opened, taken.is_full, taken.is_sink)
    rank = _rank_of(order)
    places, free = _free_places(pool, jnp.zeros(capacity, bool))
    has_room = is_exact & (rank < free)
    place = jnp.where(has_room, places[jnp.clip(rank, 0, capacity - 1)], capacity)
    content = _pages(taken, jnp.arange(most, dtype=jnp.int32))
    since = _rank_of(jnp.argsort(taken.opened).astype(jnp.int32))
    return dataclasses.replace(
        pool,
        codes=arrays.put_pages(pool.codes, content, jnp.where(is_exact & ~has_room, page, num_pages)),
        rows=arrays.put_pages(pool.rows, taken.rows, place),
        page=pool.page.at[place].set(page, mode="drop"),
        opened=pool.opened.at[place].set(pool.opened.max() + 1 + since, mode="drop"),
        is_full=pool.is_full.at[place].set(taken.is_full, mode="drop"),
        is_sink=pool.is_sink.at[place].set(taken.is_sink, mode="drop"),
    )


def copy_pages(
    pool: ExactPages,
    source: jax.Array,  # [n]
    target: jax.Array,  # [n]
) -> ExactPages:
    """Return a pool with pages copied: an exact one to a place of its own, or packed where none is free."""
    num_pages = pool.shape[1]
    target = arrays.final_targets(source, target, num_pages)
    source = jnp.where(target < num_pages, source, num_pages)  # so that dropped pairs take no room
    return put_pages(pool, take_pages(pool, source, min(len(source), pool.capacity)), target)
