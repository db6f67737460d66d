"""The ``xla`` backend: plain JAX whose cost follows the sum of the lengths, on any device.

Queries go tile by tile (one row of a decode, or :data:`TILE` queries of a prefill), and each tile loops over
blocks of its own sequence's slots, as far as its own positions reach, with a running softmax (Milakov and
Gimelshein, 2018; the blocked form of FlashAttention). Pages stay quantized up to the dot.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from qpaged._compat import varying_as
from qpaged.arrays import as_slots, compute_dtype, dot, keep_slots, take_pages
from qpaged.attention._layout import padded
from qpaged.attention._options import FLOOR, Options, Tokens, grouped, ungrouped

BLOCK = 256  # slots read at once: what is made of them, and of a tile's scores, stays in a core's cache
TILE = 128  # queries of a prefill that read together

QK = (((2,), (2,)), ((0,), (0,)))  # (heads, rows, dim) . (heads, slots, dim)
PV = (((2,), (1,)), ((0,), (0,)))  # (heads, rows, slots) . (heads, slots, dim)


def attend(tokens: Tokens, keys: Any, values: Any, sinks: jax.Array | None, options: Options) -> jax.Array:
    """Attention of each token over its sequence's pages, (n, q_heads, head_dim) float32."""
    page_size = keys.shape[2]
    pages = max(1, min(BLOCK // page_size, tokens.table.shape[-1]))
    table = padded(tokens.table, pages, options.num_pages, axis=-1)

    def tile(query, position, table):
        return _tile(query, position, table, pages, keys, values, sinks, options)

    if not tokens.is_prefill:
        row = lambda args: tile(args[0][None], args[1][None], args[2])[0]  # noqa: E731
        return lax.map(row, (tokens.query, tokens.position, table))
    n = len(tokens.query)
    size = min(TILE, n)
    query, position = padded(tokens.query, size, 0), padded(tokens.position, size, -1)
    tiles = query.reshape(-1, size, *query.shape[1:]), position.reshape(-1, size)
    return lax.map(lambda args: tile(args[0], args[1], table), tiles).reshape(query.shape)[:n]


def _tile(query, position, table, pages: int, keys, values, sinks, options: Options) -> jax.Array:
    kv_heads, _, page_size, head_dim = keys.shape
    n, rows, size = len(query), query.shape[0] * query.shape[1] // kv_heads, pages * page_size
    q = grouped(query, kv_heads)

    def block(index, state):
        top, total, out = state
        held = lax.dynamic_slice_in_dim(table, index * pages, pages)
        slot = index * size + jnp.arange(size, dtype=jnp.int32)
        seen = options.attends(position, table, slot, page_size)
        held = options.held(held, seen)
        k = as_slots(take_pages(keys, held))
        v = keep_slots(as_slots(take_pages(values, held)), seen.any(axis=0))

        seen = jnp.repeat(seen, rows // n, axis=0)
        scores = options.scores(dot(q.astype(compute_dtype(query, keys)), k, QK))
        higher = jnp.maximum(top, jnp.where(seen, scores, FLOOR).max(axis=-1))
        weights = jnp.where(seen, jnp.exp(scores - higher[..., None]), 0).astype(compute_dtype(query, values))
        fade = jnp.exp(top - higher)
        total = total * fade + weights.astype(jnp.float32).sum(axis=-1)  # the weights that the dot uses
        return higher, total, out * fade[..., None] + dot(weights, v, PV)

    if sinks is None:
        top, total = jnp.full((kv_heads, rows), FLOOR, jnp.float32), jnp.zeros((kv_heads, rows), jnp.float32)
    else:
        top, total = jnp.tile(sinks.reshape(kv_heads, -1), n), jnp.ones((kv_heads, rows), jnp.float32)
    state = top, total, jnp.zeros((kv_heads, rows, head_dim), jnp.float32)
    state = varying_as(state, (query, position, table, keys, values, state))
    first, last = _blocks(position, size, options.sliding_window)
    _, total, out = lax.fori_loop(first, last, block, state)
    return ungrouped(out / jnp.where(total > 0, total, 1)[..., None], n)


def _blocks(position: jax.Array, size: int, window: int | None) -> tuple[jax.Array, jax.Array]:
    """The blocks that any of the positions sees: from, to (excluded)."""
    last = position.max() // size + 1
    if window is None:
        return jnp.int32(0), last
    lowest = jnp.where(position >= 0, position, position.max()).min()
    return jnp.maximum(lowest - window + 1, 0) // size, last
