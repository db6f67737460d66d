"""Attention to the tokens of the call itself, as they are given and not as the cache will hold them."""

import dataclasses
from typing import NamedTuple, Self, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from qpaged.arrays import common_dtype
from qpaged.attention import _backends
from qpaged.attention._backends import AttentionCall
from qpaged.attention._layout import pad_to_multiple
from qpaged.attention._merge import Partial
from qpaged.attention._options import Options, QueryTokens, Span

AnyArray = TypeVar("AnyArray", jax.Array, np.ndarray)


class NewTokens(NamedTuple):
    """Keys and values of the tokens of a call, [tokens, kv_heads, head_dim] each."""

    key: jax.Array
    value: jax.Array


class NewPages(NamedTuple):
    """The new tokens of sequences in plain pages, and where the queries of runs are among them.

    Attributes:
        keys: [kv_heads, pages, page_size, head_dim].
        values: likewise.
        place: [tokens] int32, each query's place among the new tokens of its sequence; negative for padding.
        table: [runs, pages] int32, the pages of the run's sequence.
        first: [runs] int32, the position of the first new token of the run's sequence.
        length: [runs] int32, the new tokens of the run's sequence.
        is_right: [runs] bool, True if their positions follow one another; the rows are NaN where they do not.
    """

    keys: jax.Array
    values: jax.Array
    place: jax.Array
    table: jax.Array
    first: jax.Array
    length: jax.Array
    is_right: jax.Array

    @classmethod
    def of_prefill(cls, tokens: QueryTokens, new: NewTokens, page_size: int) -> Self:
        """Return the new tokens of a prefill, which is one run."""
        keys, values = (as_pages(rows, page_size) for rows in new)
        place = jnp.arange(len(tokens.position), dtype=jnp.int32)
        return cls(
            keys=keys,
            values=values,
            place=jnp.where(tokens.position >= 0, place, -1),
            table=jnp.arange(keys.shape[1], dtype=jnp.int32)[None],
            first=jnp.maximum(tokens.position[:1], 0),
            length=(tokens.position >= 0).sum(keepdims=True, dtype=jnp.int32),
            is_right=are_consecutive(tokens.position)[None],
        )


def before_new(tokens: QueryTokens, new: NewTokens | NewPages) -> QueryTokens:
    """Return the queries with an end before the first new token, which the cache does not hold yet."""
    end = new.first if isinstance(new, NewPages) else jnp.maximum(tokens.position, 0)
    return dataclasses.replace(tokens, end=end)


def are_consecutive(position: AnyArray) -> AnyArray:
    """Return [] bool, True if positions [tokens] follow one another, and padding (negative) follows them."""
    is_token = position >= 0
    index = np.arange(len(position), dtype=np.int32)
    padding_is_last = is_token == (index < is_token.sum(dtype=np.int32))
    return (padding_is_last & (~is_token | (position == position[:1] + index))).all()


def attend_new(
    backend: str | None, tokens: QueryTokens, new: NewTokens | NewPages, options: Options
) -> Partial:
    """Return the attention of a call's queries to its new tokens; a decode row sees its own alone."""
    if isinstance(new, NewTokens):
        return _attend_new_rows(tokens, new, options)
    pages = new.keys.shape[1]
    span = tokens.span
    if span is not None:  # as slots among the new tokens
        first = jnp.repeat(new.first, tokens.run_length)
        span = Span(jnp.maximum(span.first - first, 0), jnp.where(new.place >= 0, span.last - first, -1))
    local = dataclasses.replace(tokens, position=new.place, table=new.table, end=new.length, span=span)
    call, options = AttentionCall(local, new.keys, new.values), dataclasses.replace(options, num_pages=pages)
    if backend in ("xla", "reference"):  # which take any call
        out, lse = _backends.attend_by_name(backend, call, options)
    else:
        out, lse = _backends.attend(call, options)
    is_right = jnp.repeat(new.is_right, tokens.run_length) | (tokens.position < 0)
    return Partial(jnp.where(is_right[:, None, None], out, jnp.nan), lse)


def as_pages(rows: jax.Array, page_size: int) -> jax.Array:
    """Return rows [tokens, kv_heads, head_dim] as plain pages [kv_heads, pages, page_size, head_dim]."""
    rows = pad_to_multiple(rows, page_size, 0).swapaxes(0, 1)
    return rows.reshape(rows.shape[0], -1, page_size, rows.shape[2])


def _attend_new_rows(tokens: QueryTokens, new: NewTokens, options: Options) -> Partial:
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
