"""The ``reference`` backend: dequantize every page of the table, then softmax. It defines the result."""

import jax
import jax.numpy as jnp
from jax import lax

from qpaged.arrays import mask_slots, to_float32
from qpaged.attention._merge import Partial
from qpaged.attention._options import (
    Options,
    QueryTokens,
    Span,
    distance_bias,
    group_query_heads,
    ungroup_query_heads,
)
from qpaged.pools import Pages, gather_slots


def attend(tokens: QueryTokens, keys: Pages, values: Pages, options: Options) -> Partial:
    """Return the attention of each token over its sequence's pages."""

    def attend_run(
        query: jax.Array, position: jax.Array, table: jax.Array, end: jax.Array, span: Span
    ) -> Partial:
        run = QueryTokens(query, position, table, end, span, tokens.slopes)
        return _attend_run(run, keys, values, options)

    query, position, span = jax.tree_util.tree_map(
        tokens.by_run, (tokens.query, tokens.position, tokens.span_within(options.sliding_window))
    )
    out, lse = jax.vmap(attend_run)(query, position, tokens.table, tokens.end, span)
    shape = tokens.query.shape[:2]
    return Partial(out.reshape(*shape, values.shape[3]), lse.reshape(shape))


def _attend_run(
    run: QueryTokens,  # one, whose page table is [pages], and whose end is []
    keys: Pages,  # [kv_heads, num_pages, page_size, head_dim]
    values: Pages,
    options: Options,
) -> Partial:
    """Return the attention of queries over one sequence."""
    kv_heads, _, page_size, _ = keys.shape
    query = run.query  # [tokens, q_heads, head_dim]
    q_heads_per_kv = query.shape[1] // kv_heads
    span = run.span_within(options.sliding_window)  # of [tokens]
    mask = options.attention_mask(span, run.end, run.table, 0, page_size)  # [tokens, slots]
    table = options.visible_pages(run.table, mask)
    k = to_float32(gather_slots(keys, table))  # [kv_heads, slots, head_dim]
    v = to_float32(mask_slots(gather_slots(values, table), mask.any(axis=0)))
    q = group_query_heads(query, kv_heads).astype(jnp.float32)  # [kv_heads, q_rows, head_dim]
    scores = options.scale_and_cap(jnp.einsum("hqd,hsd->hqs", q, k, precision="highest"))
    if run.slopes is not None:
        slot = jnp.arange(mask.shape[1], dtype=jnp.int32)
        scores += distance_bias(run.slopes, run.position, slot, kv_heads)
    mask = jnp.repeat(mask, q_heads_per_kv, axis=0)  # [q_rows, slots]
    weights, row_max = _weights(scores, mask)
    acc = jnp.einsum("hqs,hsd->hqd", weights, v, precision="highest")
    out, lse = Partial.of_sums(acc, row_max, weights.sum(axis=-1))
    return Partial(ungroup_query_heads(out, len(query)), ungroup_query_heads(lse, len(query)))


def _weights(
    scores: jax.Array,  # [kv_heads, q_rows, slots]
    mask: jax.Array,  # [q_rows, slots]
) -> tuple[jax.Array, jax.Array]:
    """Return exp(score - highest) of each slot, 0 if not seen, and the highest score [kv_heads, q_rows]."""
    scores = jnp.where(mask, scores, -jnp.inf)
    highest = scores.max(axis=-1, initial=-jnp.inf)
    highest = lax.stop_gradient(jnp.where(highest == -jnp.inf, 0, highest))
    return jnp.exp(scores - highest[..., None]), highest
