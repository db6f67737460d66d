"""Attention to exact pages, which pools keep beside their codes: in plain JAX, at the cost of these pages."""

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax

from qpaged import pools
from qpaged.arrays import common_dtype, to_float32
from qpaged.attention._layout import join_runs, tile_runs, tile_span
from qpaged.attention._merge import Partial
from qpaged.attention._options import (
    Options,
    QueryTokens,
    Span,
    distance_bias,
    group_query_heads,
    ungroup_query_heads,
)
from qpaged.pools import ExactPages, Pages

Q_TILE = 128  # queries of a run whose scores are there at once
ROWS = 32  # decode rows whose exact pages are gathered at once


class ShortTable(NamedTuple):
    """The exact pages of sequences, [..., n] int32 each; where there are fewer, the pages are "no page"."""

    page: jax.Array
    logical_page: jax.Array


class QueryTile(NamedTuple):
    """Queries of one sequence.

    Attributes:
        query: [tokens, q_heads, head_dim].
        position: [tokens] int32.
        span: of [tokens].
        end: [] int32.
        table: of [n].
    """

    query: jax.Array
    position: jax.Array
    span: Span
    end: jax.Array
    table: ShortTable


AttendTile: TypeAlias = Callable[[QueryTile], Partial]


def is_exact(table: jax.Array, keys: Pages, values: Pages) -> jax.Array | None:
    """Return True for entries of a page table that are exact among keys or values; None if none can be."""
    marks = [pools.is_exact(pages, table) for pages in (keys, values)]
    there = [mark for mark in marks if mark is not None]
    if not there:
        return None
    return jnp.stack(there).any(axis=0)


def _is_seen(tokens: QueryTokens, page_size: int, options: Options) -> jax.Array:
    """Return, for each entry of the page tables, True if a query of the sequence sees slots of the page."""
    first = jnp.arange(tokens.table.shape[1], dtype=jnp.int32) * page_size
    span = tokens.span_within(options.sliding_window)
    first_seen, last_seen = (tokens.by_run(slot)[..., None] for slot in span)  # [runs, run_length, 1]
    is_seen = (first <= last_seen) & (first + page_size > first_seen) & (last_seen >= 0)
    return is_seen.any(axis=1)


def attend(tokens: QueryTokens, exact: jax.Array, keys: Pages, values: Pages, options: Options) -> Partial:
    """Return the attention of each token to the exact pages of its sequence.

    Where it sees more pages than are ever exact behind a write to its page, as after writes to pages far
    behind, rows are NaN.

    Args:
        tokens: the queries.
        exact: True for the entries of their page table that are exact.
        keys: [kv_heads, pages, page_size, head_dim], at least one of them with exact pages.
        values: likewise.
        options: of the call.
    """
    most = min(_most_exact(keys, values), exact.shape[-1])
    exact = exact & _is_seen(tokens, keys.shape[2], options)

    def shorten(table: jax.Array, exact: jax.Array) -> ShortTable:
        return _short_table(table, exact, most, options.num_pages)

    short = jax.vmap(shorten)(tokens.table, exact)

    def attend_tile(tile: QueryTile) -> Partial:
        return _attend(tile, keys, values, options, tokens.slopes)

    attend_all = _attend_rows if tokens.run_length == 1 else _attend_runs
    partial = attend_all(attend_tile, tokens, short, options.sliding_window)
    fits = jnp.repeat(exact.sum(axis=1, dtype=jnp.int32) <= most, tokens.run_length)
    return Partial(jnp.where(fits[..., None, None], partial.out, jnp.nan), partial.lse)


def _attend_rows(
    attend_tile: AttendTile, tokens: QueryTokens, short: ShortTable, window: int | None
) -> Partial:
    query, position, span = jax.tree_util.tree_map(
        lambda part: part[:, None], (tokens.query, tokens.position, tokens.span_within(window))
    )
    rows = QueryTile(query, position, span, tokens.end, short)
    partials = lax.map(attend_tile, rows, batch_size=min(ROWS, len(query)))  # [rows, 1, ...]
    return Partial(*(part[:, 0] for part in partials))


def _attend_runs(
    attend_tile: AttendTile, tokens: QueryTokens, short: ShortTable, window: int | None
) -> Partial:
    q_tile, runs = min(Q_TILE, tokens.run_length), len(tokens.table)
    query = tile_runs(tokens, tokens.query, q_tile, 0)
    position = tile_runs(tokens, tokens.position, q_tile, -1)
    span = tile_span(tokens, q_tile, window)

    def attend_tile_of_run(tile: tuple[jax.Array, jax.Array, Span, jax.Array]) -> Partial:
        query, position, span, run = tile
        end, table = jax.tree_util.tree_map(lambda part: part[run], (tokens.end, short))
        return attend_tile(QueryTile(query, position, span, end, table))

    run = jnp.repeat(jnp.arange(runs, dtype=jnp.int32), len(query) // runs)
    partials = lax.map(attend_tile_of_run, (query, position, span, run))
    return join_runs(Partial(*(part.reshape(-1, *part.shape[2:]) for part in partials)), tokens)


def _most_exact(keys: Pages, values: Pages) -> int:
    """Return how many pages of a sequence are exact at most."""
    kinds = [pages for pages in (keys, values) if isinstance(pages, ExactPages)]
    return max(pages.window for pages in kinds) + max(pages.sinks for pages in kinds)


def _short_table(
    table: jax.Array,  # [pages]
    exact: jax.Array,  # [pages]
    most: int,
    num_pages: int,
) -> ShortTable:
    """Return the first ``most`` exact pages of a sequence, in order."""
    rank = jnp.where(exact, jnp.cumsum(exact, dtype=jnp.int32) - 1, most)
    logical_page = jnp.arange(len(table), dtype=jnp.int32)
    return ShortTable(
        jnp.full(most, num_pages, jnp.int32).at[rank].set(table, mode="drop"),
        jnp.zeros(most, jnp.int32).at[rank].set(logical_page, mode="drop"),
    )


def _attend(
    tile: QueryTile,
    keys: Pages,
    values: Pages,
    options: Options,
    slopes: jax.Array | None,  # [q_heads]
) -> Partial:
    """Return the attention of queries to some pages of one sequence."""
    kv_heads, _, page_size, _ = keys.shape
    query, table = tile.query, tile.table
    slots = table.logical_page[:, None] * page_size + jnp.arange(page_size, dtype=jnp.int32)
    exists = (slots < tile.end) & (table.page < options.num_pages)[:, None]
    slot = slots.reshape(-1)
    mask = tile.span.sees(slot) & exists.reshape(-1)  # [tokens, slots]
    k, v = _gather(keys, values, table.page)
    v = jnp.where(mask.any(axis=0)[:, None], v, jnp.zeros((), v.dtype))  # NaN, perhaps, where no one sees it
    q = group_query_heads(query, kv_heads)
    dtype = common_dtype(q.dtype, k.dtype)
    dots = jnp.einsum(
        "hqd,hsd->hqs",
        q.astype(dtype),
        k.astype(dtype),
        precision="highest",  # or a TPU would round float32 to bfloat16
        preferred_element_type=jnp.float32,
    )
    scores = options.scale_and_cap(dots)
    if slopes is not None:
        scores += distance_bias(slopes, tile.position, slot, kv_heads)
    scores = jnp.where(jnp.repeat(mask, q.shape[1] // len(query), axis=0), scores, -jnp.inf)
    highest = scores.max(axis=-1, initial=-jnp.inf)
    highest = lax.stop_gradient(jnp.where(highest == -jnp.inf, 0, highest))
    weights = jnp.exp(scores - highest[..., None])
    acc = jnp.einsum("hqs,hsd->hqd", weights, v.astype(jnp.float32), precision="highest")
    out, lse = Partial.of_sums(acc, highest, weights.sum(axis=-1))
    return Partial(ungroup_query_heads(out, len(query)), ungroup_query_heads(lse, len(query)))


def _gather(keys: Pages, values: Pages, indices: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the slots of pages [kv_heads, slots, head_dim] as floats, exact ones as they were written."""
    if _are_alike(keys, values):
        return keys.gather_exact(indices), values.gather_exact(indices)
    k, v = (to_float32(pools.gather_slots(pages, indices)) for pages in (keys, values))
    return k, v


def _are_alike(keys: Pages, values: Pages) -> bool:
    """Return True if the same pages are exact in both, to which the same tokens were written."""
    if not isinstance(keys, ExactPages) or not isinstance(values, ExactPages):
        return False
    return (keys.window, keys.sinks, keys.capacity) == (values.window, values.sinks, values.capacity)
