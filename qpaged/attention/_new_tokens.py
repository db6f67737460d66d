"""Attention to the tokens of the call itself, as they are given and not as the cache will hold them."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from qpaged.arrays import common_dtype
from qpaged.attention import _backends
from qpaged.attention._backends import AttentionCall
from qpaged.attention._layout import pad_to_multiple
from qpaged.attention._merge import Partial
from qpaged.attention._options import Options, QueryTokens


class NewTokens(NamedTuple):
    """Keys and values of the tokens of a call, [tokens, kv_heads, head_dim] each."""

    key: jax.Array
    value: jax.Array


def before_new(tokens: QueryTokens) -> QueryTokens:
    """Return the queries with an end before the first of their own tokens, which the cache does not hold yet.

    The positions of a prefill follow one another.
    """
    end = tokens.position[0] if tokens.is_prefill else tokens.position
    return dataclasses.replace(tokens, end=jnp.maximum(end, 0))


def attend_new(
    backend: str | None, tokens: QueryTokens, new: NewTokens, page_size: int, options: Options
) -> Partial:
    """Return the causal attention of a call's queries to its own tokens."""
    if not tokens.is_prefill:
        return _attend_own(tokens, new, options)
    keys, values = (_as_pages(rows, page_size) for rows in new)
    pages = keys.shape[1]
    index = jnp.arange(len(tokens.position), dtype=jnp.int32)
    local = QueryTokens(
        query=tokens.query,
        position=jnp.where(tokens.position >= 0, index, -1),
        table=jnp.arange(pages, dtype=jnp.int32),
        end=jnp.int32(len(index)),
    )
    call, options = AttentionCall(local, keys, values), dataclasses.replace(options, num_pages=pages)
    if backend == "reference":  # the only one with derivatives in reverse
        return _backends.attend_by_name(backend, call, options)
    return _backends.attend(call, options)


def _as_pages(rows: jax.Array, page_size: int) -> jax.Array:
    """Return rows [tokens, kv_heads, head_dim] as plain pages [kv_heads, pages, page_size, head_dim]."""
    rows = pad_to_multiple(rows, page_size, 0).swapaxes(0, 1)
    return rows.reshape(rows.shape[0], -1, page_size, rows.shape[2])


def _attend_own(tokens: QueryTokens, new: NewTokens, options: Options) -> Partial:
    """Return the attention of each decode row to its own token alone."""
    rows, q_heads, head_dim = tokens.query.shape
    kv_heads = new.key.shape[1]
    dtype = common_dtype(tokens.query.dtype, new.key.dtype)
    query = tokens.query.reshape(rows, kv_heads, -1, head_dim).astype(dtype)
    dots = jnp.einsum("nhgd,nhd->nhg", query, new.key.astype(dtype), preferred_element_type=jnp.float32)
    scores = options.scale_and_cap(dots).reshape(rows, q_heads)
    values = jnp.repeat(new.value.astype(jnp.float32), q_heads // kv_heads, axis=1)
    is_active = (tokens.position >= 0)[:, None]
    return Partial(jnp.where(is_active[..., None], values, 0), jnp.where(is_active, scores, -jnp.inf))
