"""The ``xla`` backend on GPUs: many lanes side by side, each of which attends to a part of what a query sees.

A GPU launches several kernels for each step of a loop, and each must have enough to do. At a step every lane
takes a tile of slots. How many lanes a query tile gets depends on what it sees, so that all lanes end at
about the same step: a ragged batch costs the sum of its lengths, and a single long sequence is divided over
the chip. The lanes of a query tile are merged at the end.
"""

import jax
import jax.numpy as jnp
from jax import lax

from qpaged._compat import vary_like
from qpaged.attention import _xla_tiles
from qpaged.attention._layout import pad_to_multiple
from qpaged.attention._merge import Partial
from qpaged.attention._options import MASK_VALUE, Options, QueryTokens, Span, ungroup_query_heads
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

SLOTS_PER_STEP = 2**16  # of all lanes, in a decode: some fifty megabytes of codes
DECODE_LANES = 256
PREFILL_LANES = 16  # of up to 128 queries each


def attend(tokens: QueryTokens, keys: Pages, values: Pages, options: Options) -> Partial:
    """Return the attention of each token over its sequence's pages."""
    tiles = split_queries(tokens, options.sliding_window)
    count, page_size, table_pages = len(tiles.query), keys.shape[2], tokens.table.shape[1]
    if tokens.run_length > 1:
        lanes, pages_per_tile = PREFILL_LANES, max(1, min(_xla_tiles.KV_TILE // page_size, table_pages))
    else:
        lanes, pages_per_tile = decode_lanes(count, table_pages, page_size)
    table = pad_to_multiple(tokens.table, pages_per_tile, options.num_pages, axis=1)
    call = XLACall(keys, values, options, pages_per_tile, tokens.slopes)

    def attend_some(tiles: QueryTile) -> Partial:
        return _attend_q_tiles(call, lanes, tiles, table[tiles.run], tokens.end[tiles.run])

    at_once = min(lanes, count)
    if at_once == count:
        return join_tiles(attend_some(tiles), tokens)
    fills = QueryTile(query=0, position=-1, span=Span(0, -1), run=0)  # type: ignore[arg-type]
    in_turn = jax.tree_util.tree_map(
        lambda part, fill: pad_to_multiple(part, at_once, fill).reshape(-1, at_once, *part.shape[1:]),
        tiles,
        fills,
    )
    partials = lax.map(attend_some, in_turn)  # [turns, at_once, tokens, ...]
    return join_tiles(Partial(*(part.reshape(-1, *part.shape[2:])[:count] for part in partials)), tokens)


def decode_lanes(rows: int, table_pages: int, page_size: int) -> tuple[int, int]:
    """Return the most lanes of a decode step, and the pages that each takes at a step."""
    lanes = max(DECODE_LANES, rows)
    return lanes, max(1, min(SLOTS_PER_STEP // lanes // page_size, table_pages))


def _attend_q_tiles(
    call: XLACall,
    most_lanes: int,  # at least q_tiles
    tiles: QueryTile,  # [q_tiles, ...]
    table: jax.Array,  # [q_tiles, pages], a multiple of call.pages_per_tile
    end: jax.Array,  # [q_tiles]
) -> Partial:
    kv_heads, _, _, head_dim = call.values.shape
    q_tiles, tokens, q_heads, _ = tiles.query.shape
    kv_tiles = table.shape[1] // call.pages_per_tile
    lanes = min(most_lanes, q_tiles * kv_tiles)
    first_tile, end_tile = jax.vmap(visible_kv_tiles, (None, 0, 0))(call, tiles.span, end)
    count = end_tile - first_tile  # [q_tiles]
    steps = steps_for(count, kv_tiles, lanes)
    parts = _divide_up(count, steps)
    end_lane = jnp.cumsum(parts, dtype=jnp.int32)
    lane = jnp.arange(lanes, dtype=jnp.int32)
    owner = (lane[:, None] >= end_lane).sum(axis=1, dtype=jnp.int32)  # q_tiles for lanes without work
    q = jnp.minimum(owner, q_tiles - 1)
    lane_first = first_tile[q] + (lane - (end_lane[q] - parts[q])) * steps
    lane_end = jnp.where(owner < q_tiles, end_tile[q], 0)
    lane_tile, lane_end_slot = jax.tree_util.tree_map(lambda part: part[q], (tiles, end))

    def add_tiles(step: jax.Array, state: SoftmaxState) -> SoftmaxState:
        tile = lane_first + step
        page = tile[:, None] * call.pages_per_tile + jnp.arange(call.pages_per_tile, dtype=jnp.int32)
        is_seen = jax.vmap(call.options.sees_page, (0, 0, 0, None))(
            lane_tile.span, lane_end_slot, page, call.page_size
        )
        is_seen &= (tile < lane_end)[:, None]
        pages = jnp.where(is_seen, table[q[:, None], page], call.options.num_pages)
        masks = jax.vmap(call.options.attention_mask, (0, 0, 0, 0, None))(
            lane_tile.span, lane_end_slot, pages, tile * call.kv_tile, call.page_size
        )
        weigh = jax.vmap(weigh_kv_tile, (None, 0, 0, 0, 0))
        weighed = weigh(call, lane_tile, masks, tile * call.kv_tile, pages)
        # Keys and values are not to be read at once: both would lie in memory beside the pools.
        weighed = lax.optimization_barrier(weighed)
        return state.merge(jax.vmap(sum_kv_tile, (None, 0))(call, weighed))

    one = SoftmaxState.of_nothing(kv_heads, tokens * q_heads // kv_heads, head_dim)
    state = SoftmaxState(*(jnp.broadcast_to(part, (lanes, *part.shape)) for part in one))
    state = vary_like(state, (tiles, table, end, call.keys, call.values, state))
    state = lax.fori_loop(0, steps, add_tiles, state)
    row_max, row_sum, acc = _merge_lanes(state, owner == jnp.arange(q_tiles, dtype=jnp.int32)[:, None])
    out, lse = Partial.of_sums(acc, row_max, row_sum)
    ungroup = jax.vmap(lambda rows: ungroup_query_heads(rows, tokens))
    return Partial(ungroup(out), ungroup(lse))


def _divide_up(a: jax.Array, b: jax.Array) -> jax.Array:
    return lax.div(a + b - 1, b)


def steps_for(
    count: jax.Array,  # [q_tiles], at most kv_tiles
    kv_tiles: int,
    lanes: int,  # at least q_tiles
) -> jax.Array:
    """Return the fewest steps in which lanes that take a tile at a step get through so many tiles."""
    steps = jnp.arange(1, kv_tiles + 1, dtype=jnp.int32)
    lanes_needed = _divide_up(count, steps[:, None]).sum(axis=1, dtype=jnp.int32)
    return 1 + (lanes_needed > lanes).sum(dtype=jnp.int32)


def _merge_lanes(
    state: SoftmaxState,  # of [lanes]
    is_own: jax.Array,  # [q_tiles, lanes]
) -> SoftmaxState:
    """Return the softmax of each query tile over what its own lanes have seen."""

    def of_own(x: jax.Array, other: float) -> jax.Array:
        return jnp.where(is_own.reshape(*is_own.shape, *[1] * (x.ndim - 1)), x, other)

    row_max = of_own(state.row_max, MASK_VALUE).max(axis=1)  # [q_tiles, kv_heads, q_rows]
    alpha = jnp.exp(of_own(state.row_max, MASK_VALUE) - row_max[:, None])
    row_sum = (of_own(state.row_sum, 0) * alpha).sum(axis=1)
    return SoftmaxState(row_max, row_sum, (of_own(state.acc, 0) * alpha[..., None]).sum(axis=1))
