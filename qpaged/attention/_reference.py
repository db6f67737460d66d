"""The ``reference`` backend: dequantize every page of the table, then softmax. It defines the result."""

import jax
import jax.numpy as jnp

from qpaged.arrays import mask_slots, to_float32
from qpaged.attention._options import (
    Options,
    QueryTokens,
    group_query_heads,
    ungroup_query_heads,
)
from qpaged.pools import Pages, gather_slots


def attend(
    tokens: QueryTokens, keys: Pages, values: Pages, sinks: jax.Array | None, options: Options
) -> jax.Array:
    """Return the attention of each token over its sequence's pages, [tokens, q_heads, head_dim] float32."""
    if tokens.is_prefill:
        return _attend_sequence(tokens.query, tokens.position, tokens.table, keys, values, sinks, options)

    def attend_row(query: jax.Array, position: jax.Array, table: jax.Array) -> jax.Array:
        return _attend_sequence(query[None], position[None], table, keys, values, sinks, options)[0]

    return jax.vmap(attend_row)(tokens.query, tokens.position, tokens.table)


def _attend_sequence(
    query: jax.Array,  # [tokens, q_heads, head_dim]
    position: jax.Array,  # [tokens]
    table: jax.Array,  # [pages]
    keys: Pages,  # [kv_heads, num_pages, page_size, head_dim]
    values: Pages,
    sinks: jax.Array | None,  # [q_heads]
    options: Options,
) -> jax.Array:
    kv_heads, _, page_size, _ = keys.shape
    tokens = len(query)
    q_heads_per_kv = query.shape[1] // kv_heads
    slot = jnp.arange(len(table) * page_size, dtype=jnp.int32)
    mask = options.attention_mask(position, table, slot, page_size)  # [tokens, slots]

    table = options.visible_pages(table, mask)
    k = to_float32(gather_slots(keys, table))  # [kv_heads, slots, head_dim]
    v = to_float32(mask_slots(gather_slots(values, table), mask.any(axis=0)))
    q = group_query_heads(query, kv_heads).astype(jnp.float32)  # [kv_heads, q_rows, head_dim]
    scores = options.scale_and_cap(jnp.einsum("hqd,hsd->hqs", q, k, precision="highest"))
    mask = jnp.repeat(mask, q_heads_per_kv, axis=0)  # [q_rows, slots]
    weights = _softmax(scores, mask, _sink_of_each_row(sinks, kv_heads, tokens, q_heads_per_kv))
    return ungroup_query_heads(jnp.einsum("hqs,hsd->hqd", weights, v, precision="highest"), tokens)


def _sink_of_each_row(sinks: jax.Array | None, kv_heads: int, tokens: int, q_heads_per_kv: int) -> jax.Array:
    """Return the sink of every query row, [kv_heads, q_rows]; -inf where there are no sinks."""
    if sinks is None:
        return jnp.full((kv_heads, tokens * q_heads_per_kv), -jnp.inf, jnp.float32)
    return jnp.tile(sinks.reshape(kv_heads, q_heads_per_kv), tokens)


def _softmax(
    scores: jax.Array,  # [kv_heads, q_rows, slots]
    mask: jax.Array,  # [q_rows, slots]
    sink: jax.Array,  # [kv_heads, q_rows]
) -> jax.Array:
    """Return the softmax weights of the slots. A sink takes a share of the weight and adds no value.

    The weights of a row that sees nothing are zeros.
    """
    scores = jnp.where(mask, scores, -jnp.inf)
    highest = jnp.maximum(scores.max(axis=-1, initial=-jnp.inf), sink)[..., None]
    highest = jnp.where(jnp.isfinite(highest), highest, 0)
    weights = jnp.exp(scores - highest)
    total = weights.sum(axis=-1, keepdims=True) + jnp.exp(sink[..., None] - highest)
    return weights / jnp.where(total == 0, 1, total)  # the total of a NaN sink stays NaN
