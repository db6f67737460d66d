"""The ``xla`` backend: plain JAX whose cost follows the sum of the sequence lengths, on any device.

A query tile is one decode row, or :data:`Q_TILE` queries of a prefill. Each loops over tiles of its own
sequence's slots, only those that its positions see, with an online softmax (Milakov and Gimelshein, 2018; in
tiles as in FlashAttention, Dao et al., 2022). Pages stay quantized up to the dot product.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from qpaged._compat import vary_like
from qpaged.arrays import compute_dtype, dot, mask_slots
from qpaged.attention._layout import pad_to_multiple, visible_range
from qpaged.attention._merge import Partial
from qpaged.attention._options import (
    MASK_VALUE,
    Options,
    QueryTokens,
    group_query_heads,
    ungroup_query_heads,
)
from qpaged.pools import Pages, gather_slots

KV_TILE = 256  # slots read at once; a tile's scores and decoded slots then fit in a CPU core's cache
Q_TILE = 128  # queries of a prefill that share what is read

QK = (((2,), (2,)), ((0,), (0,)))  # [heads, rows, dim] . [heads, slots, dim]
PV = (((2,), (1,)), ((0,), (0,)))  # [heads, rows, slots] . [heads, slots, dim]


class XLACall(NamedTuple):
    """The arguments that all query tiles of a call share."""

    keys: Pages  # [kv_heads, num_pages, page_size, head_dim]
    values: Pages
    options: Options
    pages_per_tile: int

    @property
    def kv_tile(self) -> int:
        """Slots of a tile of keys and values."""
        return self.pages_per_tile * self.keys.shape[2]


class SoftmaxState(NamedTuple):
    """The online softmax over the slots so far."""

    row_max: jax.Array  # [kv_heads, q_rows]
    row_sum: jax.Array  # [kv_heads, q_rows]
    acc: jax.Array  # [kv_heads, q_rows, head_dim]


def attend(tokens: QueryTokens, keys: Pages, values: Pages, options: Options) -> Partial:
    """Return the attention of each token over its sequence's pages."""
    pages_per_tile = max(1, min(KV_TILE // keys.shape[2], tokens.table.shape[-1]))
    table = pad_to_multiple(tokens.table, pages_per_tile, options.num_pages, axis=-1)
    call = XLACall(keys, values, options, pages_per_tile)
    if tokens.is_prefill:
        return _attend_prefill(call, tokens.query, tokens.position, table, tokens.end)

    def attend_row(row: tuple[jax.Array, ...]) -> Partial:
        query, position, table, end = row
        out, lse = _attend_q_tile(call, query[None], position[None], table, end)
        return Partial(out[0], lse[0])

    return lax.map(attend_row, (tokens.query, tokens.position, table, tokens.end))


def _attend_prefill(
    call: XLACall,
    query: jax.Array,  # [tokens, q_heads, head_dim]
    position: jax.Array,  # [tokens]
    table: jax.Array,  # [pages]
    end: jax.Array,  # []
) -> Partial:
    tokens = len(query)
    q_tile = min(Q_TILE, tokens)
    query = pad_to_multiple(query, q_tile, 0)
    position = pad_to_multiple(position, q_tile, -1)

    def attend_tile(tile: tuple[jax.Array, jax.Array]) -> Partial:
        return _attend_q_tile(call, tile[0], tile[1], table, end)

    tiles = query.reshape(-1, q_tile, *query.shape[1:]), position.reshape(-1, q_tile)
    out, lse = lax.map(attend_tile, tiles)
    return Partial(out.reshape(query.shape)[:tokens], lse.reshape(query.shape[:2])[:tokens])


def _attend_q_tile(
    call: XLACall,
    query: jax.Array,  # [tokens, q_heads, head_dim]
    position: jax.Array,  # [tokens]
    table: jax.Array,  # [pages], a multiple of call.pages_per_tile
    end: jax.Array,  # []
) -> Partial:
    kv_heads = call.keys.shape[0]
    tokens, q_heads, _ = query.shape
    q = group_query_heads(query, kv_heads)  # [kv_heads, q_rows, head_dim]

    def attend_kv_tile(tile_index: jax.Array, state: SoftmaxState) -> SoftmaxState:
        k, v, mask = _read_kv_tile(call, position, table, end, tile_index)
        mask = jnp.repeat(mask, q_heads // kv_heads, axis=0)  # [q_rows, slots]
        dots = dot(q.astype(compute_dtype(query, call.keys)), k, QK)
        scores = call.options.scale_and_cap(dots)
        m_prev, l_prev, acc = state
        m_next = jnp.maximum(m_prev, jnp.where(mask, scores, MASK_VALUE).max(axis=-1))
        weights = jnp.where(mask, jnp.exp(scores - m_next[..., None]), 0)
        weights = weights.astype(compute_dtype(query, call.values))
        alpha = jnp.exp(m_prev - m_next)
        # The sum is of the rounded weights, which the dot product with the values uses.
        l_next = l_prev * alpha + weights.astype(jnp.float32).sum(axis=-1)
        return SoftmaxState(m_next, l_next, acc * alpha[..., None] + dot(weights, v, PV))

    state = _initial_state(q)
    # Inside shard_map the carry must vary along the mesh axes that the operands vary along.
    state = vary_like(state, (query, position, table, end, call.keys, call.values, state))
    first_tile, end_tile = _visible_kv_tiles(position, end, call.kv_tile, call.options.sliding_window)
    row_max, row_sum, acc = lax.fori_loop(first_tile, end_tile, attend_kv_tile, state)
    out, lse = Partial.of_sums(acc, row_max, row_sum)
    return Partial(ungroup_query_heads(out, tokens), ungroup_query_heads(lse, tokens))


def _read_kv_tile(
    call: XLACall,
    position: jax.Array,  # [tokens]
    table: jax.Array,  # [pages]
    end: jax.Array,  # []
    tile_index: jax.Array,
) -> tuple[Pages, Pages, jax.Array]:
    """Return a tile's keys and values [kv_heads, slots, head_dim] and its mask [tokens, slots]."""
    pages = lax.dynamic_slice_in_dim(table, tile_index * call.pages_per_tile, call.pages_per_tile)
    slot = tile_index * call.kv_tile + jnp.arange(call.kv_tile, dtype=jnp.int32)
    mask = call.options.attention_mask(position, end, table, slot, call.keys.shape[2])
    pages = call.options.visible_pages(pages, mask)
    k = gather_slots(call.keys, pages)
    # A masked value may be NaN, and its weight of zero would not hide that.
    v = mask_slots(gather_slots(call.values, pages), mask.any(axis=0))
    return k, v, mask


def _initial_state(
    q: jax.Array,  # [kv_heads, q_rows, head_dim]
) -> SoftmaxState:
    """Return the state before the first slot."""
    row_max = jnp.full(q.shape[:2], MASK_VALUE, jnp.float32)
    return SoftmaxState(row_max, jnp.zeros_like(row_max), jnp.zeros(q.shape, jnp.float32))


def _visible_kv_tiles(
    position: jax.Array,  # [tokens]
    end: jax.Array,  # []
    kv_tile: int,
    window: int | None,
) -> tuple[jax.Array, jax.Array]:
    """Return the first tile that any query sees, and one past the last."""
    first_slot, last_slot = visible_range(position[None], end, window)[0]
    slots = jnp.int32(kv_tile)
    return lax.div(first_slot, slots), lax.div(last_slot + slots, slots)
