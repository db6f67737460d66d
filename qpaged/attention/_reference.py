"""The reference: every page of the table, dequantized, and a softmax; it defines the meaning."""

from typing import Any

import jax
import jax.numpy as jnp

from qpaged.arrays import QuantizedArray, as_slots, keep_slots, take_pages
from qpaged.attention._options import Options, Tokens, grouped, ungrouped


def attend(tokens: Tokens, keys: Any, values: Any, sinks: jax.Array | None, options: Options) -> jax.Array:
    """Attention of each token over its sequence's pages, (n, q_heads, head_dim) float32."""
    if tokens.is_prefill:
        return _sequence(tokens.query, tokens.position, tokens.table, keys, values, sinks, options)

    def row(query, position, table):
        return _sequence(query[None], position[None], table, keys, values, sinks, options)[0]

    return jax.vmap(row)(tokens.query, tokens.position, tokens.table)


def _sequence(query, position, table, keys, values, sinks, options: Options) -> jax.Array:
    kv_heads, _, page_size, _ = keys.shape
    group = query.shape[1] // kv_heads
    slot = jnp.arange(len(table) * page_size, dtype=jnp.int32)
    seen = options.attends(position, table, slot, page_size)

    table = options.held(table, seen)
    k = _float32(as_slots(take_pages(keys, table)))
    v = _float32(keep_slots(as_slots(take_pages(values, table)), seen.any(axis=0)))
    q = grouped(query, kv_heads).astype(jnp.float32)  # (kv_heads, n * group, head_dim)
    scores = options.scores(jnp.einsum("hqd,hsd->hqs", q, k, precision="highest"))
    weights = _softmax(scores, jnp.repeat(seen, group, axis=0), sinks, len(query))
    return ungrouped(jnp.einsum("hqs,hsd->hqd", weights, v, precision="highest"), len(query))


def _softmax(scores: jax.Array, seen: jax.Array, sinks: jax.Array | None, n: int) -> jax.Array:
    """Softmax over what is seen and the sink, which takes weight and gives nothing; zeros where neither."""
    scores = jnp.where(seen, scores, -jnp.inf)
    sink = (
        jnp.full(scores.shape[:2], -jnp.inf, jnp.float32)
        if sinks is None
        else jnp.tile(sinks.reshape(len(scores), -1), n)
    )
    top = jnp.maximum(scores.max(axis=-1, initial=-jnp.inf), sink)[..., None]
    top = jnp.where(jnp.isfinite(top), top, 0)
    weights = jnp.exp(scores - top)
    total = weights.sum(axis=-1, keepdims=True) + jnp.exp(sink[..., None] - top)
    return weights / jnp.where(total > 0, total, 1)


def _float32(slots: Any) -> jax.Array:
    return slots.dequantize() if isinstance(slots, QuantizedArray) else slots.astype(jnp.float32)
