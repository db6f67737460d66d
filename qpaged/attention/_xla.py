"""The ``xla`` backend: plain JAX whose cost follows the sum of the sequence lengths, on any device.

A query tile is one decode row, or some queries of a run. Each loops over tiles of its own sequence's
slots, only those that its positions see. On GPUs, where a loop's step must have more to do than that, many
tiles are taken at a step: see :mod:`qpaged.attention._xla_lanes`.
"""

import jax
import jax.numpy as jnp
from jax import lax

from qpaged._compat import vary_like
from qpaged._platforms import by_platform
from qpaged.attention import _xla_lanes, _xla_tiles
from qpaged.attention._layout import pad_to_multiple
from qpaged.attention._merge import Partial
from qpaged.attention._options import Options, QueryTokens, ungroup_query_heads, with_options
from qpaged.attention._xla_tiles import (
    QueryTile,
    SoftmaxState,
    XLACall,
    join_tiles,
    split_queries,
    sum_kv_tile,
    visible_kv_tiles,
    weigh_kv_tile,
)
from qpaged.pools import Pages


def attend(tokens: QueryTokens, keys: Pages, values: Pages, options: Options) -> Partial:
    """Return the attention of each token over its sequence's pages."""
    in_lanes = with_options(_xla_lanes.attend, options)
    return by_platform(
        tokens,
        keys,
        values,
        default=with_options(attend_in_turn, options),
        partitionable=True,
        cuda=in_lanes,
        rocm=in_lanes,
    )


def attend_in_turn(tokens: QueryTokens, keys: Pages, values: Pages, options: Options) -> Partial:
    """Return the same, one query tile after another, up to the last one that has a token."""
    pages_per_tile = max(1, min(_xla_tiles.KV_TILE // keys.shape[2], tokens.table.shape[-1]))
    table = pad_to_multiple(tokens.table, pages_per_tile, options.num_pages, axis=-1)
    call = XLACall(keys, values, options, pages_per_tile, tokens.slopes)
    tiles = split_queries(tokens, options.sliding_window)

    def add_tile(index: jax.Array, attended: Partial) -> Partial:
        tile = jax.tree_util.tree_map(
            lambda part: lax.dynamic_index_in_dim(part, index, keepdims=False), tiles
        )
        partial = _attend_q_tile(call, tile, table[tile.run], tokens.end[tile.run])
        return Partial(*(whole.at[index].set(part) for whole, part in zip(attended, partial, strict=True)))

    shape = tiles.query.shape[:-1]
    nothing = Partial(
        jnp.zeros((*shape, values.shape[3]), jnp.float32), jnp.full(shape, -jnp.inf, jnp.float32)
    )
    nothing = vary_like(nothing, (tiles, table, tokens.end, keys, values, nothing))
    number = 1 + jnp.arange(len(tiles.run), dtype=jnp.int32)
    is_used = (tiles.span.last >= 0).any(axis=1)
    count = jnp.where(is_used, number, 0).max(initial=0)
    return join_tiles(lax.fori_loop(0, count, add_tile, nothing), tokens)


def _attend_q_tile(
    call: XLACall,
    tile: QueryTile,  # one
    table: jax.Array,  # [pages], a multiple of call.pages_per_tile
    end: jax.Array,  # []
) -> Partial:
    kv_heads, _, _, head_dim = call.values.shape
    tokens, q_heads, _ = tile.query.shape

    def add_kv_tile(tile_index: jax.Array, state: SoftmaxState) -> SoftmaxState:
        pages = lax.dynamic_slice_in_dim(table, tile_index * call.pages_per_tile, call.pages_per_tile)
        first_slot = tile_index * call.kv_tile
        mask = call.options.attention_mask(tile.span, end, pages, first_slot, call.page_size)
        weighed = weigh_kv_tile(call, tile, mask, first_slot, call.options.visible_pages(pages, mask))
        return state.merge(sum_kv_tile(call, weighed))

    state = SoftmaxState.of_nothing(kv_heads, tokens * q_heads // kv_heads, head_dim)
    # Inside shard_map the carry must vary along the mesh axes that the operands vary along.
    state = vary_like(state, (tile, table, end, call.keys, call.values, state))
    first_tile, end_tile = visible_kv_tiles(call, tile.span, end)
    row_max, row_sum, acc = lax.fori_loop(first_tile, end_tile, add_kv_tile, state)
    out, lse = Partial.of_sums(acc, row_max, row_sum)
    return Partial(ungroup_query_heads(out, tokens), ungroup_query_heads(lse, tokens))
