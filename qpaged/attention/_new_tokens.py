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

    The positions of a prefill follow one another: see :func:`are_consecutive`.
    """
    end = tokens.position[0] if tokens.is_prefill else tokens.position
    return dataclasses.replace(tokens, end=jnp.maximum(end, 0))


def are_consecutive(position: jax.Array) -> jax.Array:
    """Return [] bool, True if positions [tokens] follow one another, and padding (negative) follows them."""
    is_token = position >= 0
    index = jnp.arange(len(position), dtype=jnp.int32)
    padding_is_last = is_token == (index < is_token.sum(dtype=jnp.int32))
    return jnp.all(padding_is_last & (~is_token | (position == position[:1] + index)))


def attend_new(
    backend: str | None, tokens: QueryTokens, new: NewTokens, page_size: int, options: Options
) -> Partial:
    """Return the causal attention of a call's queries to its new tokens.

    Each decode row sees its own alone. Rows of a prefill whose positions do not follow one another are NaN.
    """
    if not tokens.is_prefill:
        return _attend_new_decodes(tokens, new, options)
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
    if backend in ("xla", "reference"):  # which take any call
        out, lse = _backends.attend_by_name(backend, call, options)
    else:
        out, lse = _backends.attend(call, options)
    is_right = are_consecutive(tokens.position) | (tokens.position < 0)
    return Partial(jnp.where(is_right[:, None, None], out, jnp.nan), lse)


def _as_pages(rows: jax.Array, page_size: int) -> jax.Array:
    """Return rows [tokens, kv_heads, head_dim] as plain pages [kv_heads, pages, page_size, head_dim]."""
    rows = pad_to_multiple(rows, page_size, 0).swapaxes(0, 1)
    return rows.reshape(rows.shape[0], -1, page_size, rows.shape[2])


def _attend_new_decodes(tokens: QueryTokens, new: NewTokens, options: Options) -> Partial:
    """Return the attention of each decode row to its own token alone."""
    rows, q_heads, head_dim = tokens.query.shape
    kv_heads = new.key.shape[1]
    is_active = (tokens.position >= 0)[:, None, None]
    key, value = (
        jnp.where(is_active, array, jnp.zeros((), array.dtype)) for array in new
    )  # which may be NaN
    dtype = common_dtype(tokens.query.dtype, key.dtype)
    dots = jnp.einsum(
        "nhgd,nhd->nhg",
        tokens.query.reshape(rows, kv_heads, -1, head_dim).astype(dtype),
        key.astype(dtype),
        precision="highest",  # or a TPU would round float32 to bfloat16
        preferred_element_type=jnp.float32,
    )
    scores = options.scale_and_cap(dots).reshape(rows, q_heads)
    out = jnp.repeat(value.astype(jnp.float32), q_heads // kv_heads, axis=1)
    return Partial(out, jnp.where(is_active[..., 0], scores, -jnp.inf))
