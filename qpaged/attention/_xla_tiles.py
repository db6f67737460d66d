"""Attention of a query tile to a tile of its sequence's slots, and how such partial softmaxes are merged.

An online softmax (Milakov and Gimelshein, 2018; in tiles as in FlashAttention, Dao et al., 2022). Pages stay
quantized up to the dot product.
"""

from typing import NamedTuple, Self

import jax
import jax.numpy as jnp
from jax import lax

from qpaged.arrays import compute_dtype, dot, mask_slots
from qpaged.attention._layout import join_runs, tile_runs, tile_span, visible_range
from qpaged.attention._merge import Partial
from qpaged.attention._options import (
    MASK_VALUE,
    Options,
    QueryTokens,
    Span,
    distance_bias,
    group_query_heads,
)
from qpaged.pools import Pages, gather_slots

KV_TILE = 256  # slots read at once; a tile's scores and decoded slots then fit in a CPU core's cache
Q_TILE = 128  # queries of a run that share what is read

QK = (((2,), (2,)), ((0,), (0,)))  # [heads, rows, dim] . [heads, slots, dim]
PV = (((2,), (1,)), ((0,), (0,)))  # [heads, rows, slots] . [heads, slots, dim]


class XLACall(NamedTuple):
    """The arguments that all query tiles of a call share."""

    keys: Pages  # [kv_heads, num_pages, page_size, head_dim]
    values: Pages
    options: Options
    pages_per_tile: int
    slopes: jax.Array | None  # [q_heads]

    @property
    def page_size(self) -> int:
        """Slots of a page."""
        return self.keys.shape[2]

    @property
    def kv_tile(self) -> int:
        """Slots of a tile of keys and values."""
        return self.pages_per_tile * self.page_size


class SoftmaxState(NamedTuple):
    """The softmax over some slots."""

    row_max: jax.Array  # [kv_heads, q_rows]
    row_sum: jax.Array  # [kv_heads, q_rows]
    acc: jax.Array  # [kv_heads, q_rows, head_dim]

    @classmethod
    def of_nothing(cls, kv_heads: int, q_rows: int, head_dim: int) -> Self:
        """Return the state before the first slot."""
        row_max = jnp.full((kv_heads, q_rows), MASK_VALUE, jnp.float32)
        acc = jnp.zeros((kv_heads, q_rows, head_dim), jnp.float32)
        return cls(row_max, jnp.zeros_like(row_max), acc)

    def merge(self, other: Self) -> Self:
        """Return the softmax over the slots of both."""
        row_max = jnp.maximum(self.row_max, other.row_max)
        alpha, beta = jnp.exp(self.row_max - row_max), jnp.exp(other.row_max - row_max)
        row_sum = self.row_sum * alpha + other.row_sum * beta
        return type(self)(row_max, row_sum, self.acc * alpha[..., None] + other.acc * beta[..., None])


class QueryTile(NamedTuple):
    """Query tiles, or one: what is of each tile alone, and which run it is a part of.

    Attributes:
        query: [..., tokens, q_heads, head_dim].
        position: [..., tokens] int32.
        span: of [..., tokens].
        run: [...] int32.
    """

    query: jax.Array
    position: jax.Array
    span: Span
    run: jax.Array


def split_queries(tokens: QueryTokens, window: int | None) -> QueryTile:
    """Return the query tiles of all runs, [q_tiles, ...]."""
    q_tile, runs = min(Q_TILE, tokens.run_length), len(tokens.table)
    query = tile_runs(tokens, tokens.query, q_tile, 0)
    return QueryTile(
        query=query,
        position=tile_runs(tokens, tokens.position, q_tile, -1),
        span=tile_span(tokens, q_tile, window),
        run=jnp.repeat(jnp.arange(runs, dtype=jnp.int32), len(query) // runs),
    )


def join_tiles(partials: Partial, tokens: QueryTokens) -> Partial:
    """Return the partials of query tiles, [q_tiles, tokens, q_heads, ...], as one of all tokens."""
    return join_runs(Partial(*(part.reshape(-1, *part.shape[2:]) for part in partials)), tokens)


class Weighed(NamedTuple):
    """A tile of slots whose keys have been read: what is left to do with its values."""

    row_max: jax.Array  # [kv_heads, q_rows]
    weights: jax.Array  # [kv_heads, q_rows, slots], exp(score - row_max)
    pages: jax.Array  # [pages_per_tile], "no page" where no query sees them
    is_seen: jax.Array  # [slots], by some query


def weigh_kv_tile(
    call: XLACall,
    tile: QueryTile,  # one
    mask: jax.Array,  # [tokens, slots]
    first_slot: jax.Array,  # []
    pages: jax.Array,  # [pages_per_tile], "no page" where no query sees them
) -> Weighed:
    """Return the weights of a tile of slots, which lies in these pages, for a query tile."""
    kv_heads, query = call.keys.shape[0], tile.query
    k = gather_slots(call.keys, pages)  # [kv_heads, slots, head_dim]
    q = group_query_heads(query, kv_heads)  # [kv_heads, q_rows, head_dim]
    scores = call.options.scale_and_cap(dot(q.astype(compute_dtype(query, call.keys)), k, QK))
    if call.slopes is not None:
        slot = first_slot + jnp.arange(call.kv_tile, dtype=jnp.int32)
        scores += distance_bias(call.slopes, tile.position, slot, kv_heads)
    of_rows = jnp.repeat(mask, query.shape[1] // kv_heads, axis=0)  # [q_rows, slots]
    row_max = jnp.where(of_rows, scores, MASK_VALUE).max(axis=-1)
    weights = jnp.where(of_rows, jnp.exp(scores - row_max[..., None]), 0)
    return Weighed(row_max, weights.astype(compute_dtype(query, call.values)), pages, mask.any(axis=0))


def sum_kv_tile(call: XLACall, tile: Weighed) -> SoftmaxState:
    """Return the softmax over a tile of slots, from its weights."""
    # A masked value may be NaN, and its weight of zero would not hide that.
    v = mask_slots(gather_slots(call.values, tile.pages), tile.is_seen)  # [kv_heads, slots, head_dim]
    # The sum is of the rounded weights, which the dot product with the values uses.
    row_sum = tile.weights.astype(jnp.float32).sum(axis=-1)
    return SoftmaxState(tile.row_max, row_sum, dot(tile.weights, v, PV))


def visible_kv_tiles(call: XLACall, span: Span, end: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the first tile of slots that any query of a query tile sees, and one past the last."""
    first_slot, last_slot = visible_range(Span(span.first[None], span.last[None]), end[None])[0]
    slots = jnp.int32(call.kv_tile)
    return lax.div(first_slot, slots), lax.div(last_slot + slots, slots)
