"""paged_attention: one function for decode and prefill, on whichever backend."""

import dataclasses
import functools
import math
import operator
from collections.abc import Callable
from typing import Any, Literal, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jax.typing import ArrayLike, DTypeLike

from qpaged import pools
from qpaged._arguments import as_array, check_type
from qpaged._compat import with_auto_axes
from qpaged._eager import compiled_if_eager
from qpaged.arrays import dtype_of_floats, invert_output, transform_query, untransformed
from qpaged.attention import _backends
from qpaged.attention._backends import BACKENDS, AttentionBackend, AttentionCall
from qpaged.attention._merge import Partial, with_sinks
from qpaged.attention._options import Options, QueryTokens
from qpaged.cache import PagedAttentionCacheMetaData, PagedAttentionCacheView, PagedAttentionMetadata
from qpaged.cache._config import LARGEST_INDEX
from qpaged.cache._metadata import check_step
from qpaged.implicit import use_implicit_args
from qpaged.pools import Pages

LARGEST_SCALE = 2.0**16
LEAST_CAP = float(jnp.finfo(jnp.float32).tiny)  # a smaller one would become 0, and scores over it NaN
LARGEST_CAP = 1e30  # scores under 1e-8 over it would be subnormal, and become zeros


def attention_backends(
    query: ArrayLike | jax.ShapeDtypeStruct | None = None,
    view: PagedAttentionCacheView | None = None,
    metadata: PagedAttentionMetadata | None = None,
) -> tuple[AttentionBackend, ...]:
    """Return all backends, in the order in which :func:`paged_attention` prefers them.

    Args:
        query: with ``view`` and ``metadata``, as :func:`paged_attention` takes them: the backends that do not
            take this call say why. Shapes are enough (``jax.eval_shape``'s).
        view: likewise.
        metadata: likewise.

    Raises:
        TypeError, ValueError: arguments that :func:`paged_attention` does not take, or not all three.
    """
    arguments = (query, view, metadata)
    if all(argument is None for argument in arguments):
        return _backends.list_backends([])
    if any(argument is None for argument in arguments):
        raise TypeError("attention_backends takes query, view and metadata together, or none of them.")
    traced_backends: list[tuple[AttentionBackend, ...]] = []

    def list_traced(
        query: jax.Array, view: PagedAttentionCacheView, metadata: PagedAttentionMetadata
    ) -> None:
        calls = []
        for tokens in _split_tokens(as_array("query", query), view, metadata):
            calls.append(_untransformed_call(tokens, view.key_pages, view.value_pages))
        traced_backends.append(_backends.list_backends(calls))

    # Traced, since shapes are enough; what it finds are no arrays, and go out by the list.
    jax.eval_shape(list_traced, query, view, metadata)
    return traced_backends[0]


@overload
def paged_attention(
    query: ArrayLike,
    view: PagedAttentionCacheView,
    metadata: PagedAttentionMetadata,
    *,
    softmax_scale: float | None = None,
    sliding_window: int | None = None,
    logits_soft_cap: float | None = None,
    sinks: ArrayLike | None = None,
    backend: str | None = None,
    return_lse: Literal[False] = False,
) -> jax.Array: ...


@overload
def paged_attention(
    query: ArrayLike,
    view: PagedAttentionCacheView,
    metadata: PagedAttentionMetadata,
    *,
    softmax_scale: float | None = None,
    sliding_window: int | None = None,
    logits_soft_cap: float | None = None,
    sinks: ArrayLike | None = None,
    backend: str | None = None,
    return_lse: Literal[True],
) -> tuple[jax.Array, jax.Array]: ...


def paged_attention(
    query: ArrayLike,  # [tokens, q_heads, head_dim]
    view: PagedAttentionCacheView,
    metadata: PagedAttentionMetadata,
    *,
    softmax_scale: float | None = None,
    sliding_window: int | None = None,
    logits_soft_cap: float | None = None,
    sinks: ArrayLike | None = None,  # [q_heads]
    backend: str | None = None,
    return_lse: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Return the attention of queries over the pages of their sequences, causal, with grouped-query heads.

    A query at position p attends to the slots 0 to p of its sequence, p included, in float32
    accumulation: softmax(softmax_scale · q·k) · v. Write its keys and values first.

    Args:
        query: (batch, q_heads, head_dim) in a decode, (padded_len, q_heads, head_dim) in a prefill, and the
            prefill's tokens followed by the decode's rows where ``metadata`` carries both.
        view: the layer's pages.
        metadata: positions and page tables.
        softmax_scale: factor of the dot products, at most 65,536 in magnitude; 1 / sqrt(head_dim) if None.
        sliding_window: attend to the last so many positions, the query's own included; to all if None.
        logits_soft_cap: scores become cap · tanh(score / cap) (Gemma 2), cap being from 1.2e-38 to 1e30;
            untouched if None.
        sinks: (q_heads,) logits that join each head's softmax and carry no value (gpt-oss); none if None, and
            where -inf. Where they are traced, and cannot be refused, +inf takes all of the weight, which
            leaves zeros, and NaN makes the head's active rows NaN.
        backend: the name of one of :func:`attention_backends`, which never falls back. None for the first of
            them that takes the call and is for the platform that the program is lowered for, be it there or
            not. Only ``reference`` can be differentiated in reverse.
        return_lse: return the log-sum-exp of the scores too, for :func:`merge_attention`.

    Returns:
        (as query) in the query's dtype; zeros for padding and for inactive rows. With ``return_lse`` the same
        in float32, and (tokens, q_heads) float32: the natural logarithm of the sum of exp(score) over the
        slots that the query sees and the sink, after scale and soft cap; -inf where it sees nothing.

    Raises:
        TypeError, ValueError: a shape, dtype or option other than these, or a backend that declines the call.
    """
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, or None, but came as {backend!r}.")
    query = as_array("query", query)
    all_tokens = _split_tokens(query, view, metadata)
    options = _checked_options(view.metadata, softmax_scale, sliding_window, logits_soft_cap)
    if sinks is not None:
        sinks = _checked_sinks(sinks, query.shape[1])
    if not all_tokens:
        out, lse = jnp.zeros_like(query), jnp.full(query.shape[:2], -jnp.inf, jnp.float32)
        return (out.astype(jnp.float32), lse) if return_lse else out
    dtype = jnp.float32 if return_lse else query.dtype
    try:
        out, lse = _attend_pools(backend, options, dtype, view.key_pages, view.value_pages, all_tokens, sinks)
    except ValueError as error:
        if "Only interpret mode is supported" not in str(error):  # JAX's words for a kernel on CPU
            raise
        raise ValueError(
            f"backend {backend!r} runs on no CPU; leave it None for the first backend that takes the call."
        ) from error
    return (out, lse) if return_lse else out


@compiled_if_eager(static_argnums=(0, 1, 2))
def _attend_pools(
    backend: str | None,
    options: Options,
    dtype: DTypeLike,
    keys: Pages,  # [kv_heads, pages, page_size, head_dim]
    values: Pages,  # [kv_heads, pages, page_size, head_dim]
    all_tokens: list[QueryTokens],
    sinks: jax.Array | None,  # [q_heads]
) -> Partial:
    """Return the attention over pools of any kind, wherever they lie."""
    attend: Callable[..., Partial] = functools.partial(_attend_all, backend, options, dtype)
    sharding = pools.explicit_sharding_of(keys, values)
    if pools.needs_implicit_args(keys, values):
        attend = use_implicit_args(attend)
    elif sharding is not None:
        over_heads = sharding.update(spec=PartitionSpec(None, sharding.spec[0]))  # as the pools' heads are
        attend = with_auto_axes(attend, over_heads)
    return attend(keys, values, all_tokens, sinks)


def _attend_all(
    backend: str | None,
    options: Options,
    dtype: DTypeLike,
    keys: Pages,  # [kv_heads, pages, page_size, head_dim]
    values: Pages,  # [kv_heads, pages, page_size, head_dim]
    all_tokens: list[QueryTokens],
    sinks: jax.Array | None,  # [q_heads]
) -> Partial:
    """Return the attention of the prefill's tokens and of the decode's rows, one after the other."""
    partials = [_attend(backend, options, keys, values, tokens, sinks) for tokens in all_tokens]
    out, lse = (jnp.concatenate(of_each) for of_each in zip(*partials, strict=True))
    return Partial(out.astype(dtype), lse)


def _attend(
    backend: str | None,
    options: Options,
    keys: Pages,
    values: Pages,
    tokens: QueryTokens,
    sinks: jax.Array | None,
) -> Partial:
    """Return the attention of tokens of one kind, on the backend asked for."""
    if not tokens.query.size or not tokens.table.shape[-1]:
        shape = tokens.query.shape
        return Partial(jnp.zeros(shape, jnp.float32), jnp.full(shape[:2], -jnp.inf, jnp.float32))
    call = _untransformed_call(tokens, keys, values)
    if backend is None:
        partial = _backends.attend(call, options)
    else:
        partial = _backends.attend_by_name(backend, call, options)
    partial = Partial(invert_output(partial.out, values), partial.lse)
    return partial if sinks is None else _with_sinks_of_active(partial, tokens.position, sinks)


def _with_sinks_of_active(partial: Partial, position: jax.Array, sinks: jax.Array) -> Partial:
    """Return a partial with the sinks, which may be NaN, in the rows that are active alone."""
    out, lse = with_sinks(partial, sinks)
    is_active = (position >= 0)[:, None]
    return Partial(jnp.where(is_active[..., None], out, 0), jnp.where(is_active, lse, -jnp.inf))


def _untransformed_call(tokens: QueryTokens, keys: Pages, values: Pages) -> AttentionCall:
    """Return the call that a backend gets: transforms are moved from the keys to the query."""
    query = transform_query(tokens.query, keys)
    return AttentionCall(dataclasses.replace(tokens, query=query), untransformed(keys), untransformed(values))


def _split_tokens(
    query: jax.Array, view: PagedAttentionCacheView, metadata: PagedAttentionMetadata
) -> list[QueryTokens]:
    """Return the prefill's tokens and the decode's rows, whichever there are, with their queries."""
    advice = "give cache.views[i], the view of layer i"
    check_type("view", view, PagedAttentionCacheView, "a qpaged.PagedAttentionCacheView", advice)
    check_step(metadata)
    config = view.metadata
    steps = [step for step in (metadata.prefill_tokens(), metadata.decodes_tokens()) if step is not None]
    count = sum(len(position) for position, _ in steps) if steps else None
    _check_query(query, count, config)
    all_tokens, start = [], 0
    for position, table in steps:
        table = table[..., : LARGEST_INDEX // config.page_size]  # no int32 position lies further
        position = jnp.where(position < table.shape[-1] * config.page_size, position, -1)
        end = start + len(position)
        all_tokens.append(QueryTokens(query[start:end], position, table))
        start = end
    return all_tokens


def _check_query(query: jax.Array, count: int | None, config: PagedAttentionCacheMetaData) -> None:
    """Raise unless the query has ``count`` tokens, any number if None, of the cache's head size."""
    dtype_of_floats("query", query.dtype)
    if query.ndim != 3:
        raise ValueError(
            f"query must have shape (tokens, q_heads, head_dim), but came with shape {query.shape}."
        )
    tokens, q_heads, head_dim = query.shape
    kv_heads = config.num_kv_heads
    fault = None
    if count not in (None, tokens):
        fault = f"a row for each of the {count} tokens of the metadata, but has {tokens} rows"
    elif q_heads == 0 or q_heads % kv_heads:
        fault = f"a multiple of the {kv_heads} KV heads, but has {q_heads} heads"
    elif head_dim != config.kv_head_dim_size:
        fault = f"the cache's head_dim {config.kv_head_dim_size}, but has {head_dim}"
    if fault is not None:
        raise ValueError(
            f"query must have {fault}; its shape {query.shape} is read as (tokens, q_heads, head_dim)."
        )


def _checked_options(
    config: PagedAttentionCacheMetaData, scale: float | None, window: int | None, cap: float | None
) -> Options:
    """Return the options of a call, or raise what is wrong with one."""
    scale = 1 / math.sqrt(config.kv_head_dim_size) if scale is None else _as_float("softmax_scale", scale)
    if not abs(scale) <= LARGEST_SCALE:  # nor NaN
        raise ValueError(
            f"softmax_scale must be at most {LARGEST_SCALE} in magnitude, so that float32 tells scores "
            f"apart, but came as {scale}; None is for 1 / sqrt(head_dim)."
        )
    if window is not None:
        try:
            window = operator.index(window)
        except TypeError as error:  # that of a traced value, too
            raise TypeError(
                f"sliding_window must be an integer that is known when the call is traced, or None for no "
                f"window, but came as {window!r}."
            ) from error
        if window < 1:
            raise ValueError(
                f"sliding_window must be at least 1, or None for no window, but came as {window}."
            )
        if window >= LARGEST_INDEX:  # which no position reaches
            window = None
    if cap is not None:
        cap = _as_float("logits_soft_cap", cap)
        if not LEAST_CAP <= cap <= LARGEST_CAP:
            raise ValueError(
                f"logits_soft_cap must be from {LEAST_CAP:.3g} to {LARGEST_CAP}, as float32 loses scores "
                f"over any other, but came as {cap}; None is for no cap."
            )
    return Options(scale, window, cap, config.num_pages_per_layer)


def _as_float(name: str, value: Any) -> float:
    """Return an option as a float, or raise TypeError unless it is a real number with a known value."""
    is_text = isinstance(value, str | bytes)  # of which float would read digits
    try:
        if not is_text and np.ndim(value) == 0 and not np.iscomplexobj(value):
            return float(value)
    except (TypeError, ValueError, OverflowError):  # that of a traced value, too
        pass
    raise TypeError(
        f"{name} must be a real number that is known when the call is traced, or None, but came as "
        f"{value!r:.60}; make it static under jit."
    )


def _checked_sinks(sinks: ArrayLike, q_heads: int) -> jax.Array:
    sinks = jnp.asarray(sinks)
    if sinks.shape != (q_heads,):
        raise ValueError(
            f"sinks must have shape (q_heads,) = ({q_heads},), but came with shape {sinks.shape}."
        )
    if not any(jnp.issubdtype(sinks.dtype, kind) for kind in (jnp.floating, jnp.integer)):
        raise TypeError(f"sinks must be real numbers, but came as {sinks.dtype.name}; take .real, say.")
    sinks = sinks.astype(jnp.float32)
    if not isinstance(sinks, jax.core.Tracer) and not np.all(np.asarray(sinks) < np.inf):  # nor NaN
        raise ValueError(f"sinks must be logits below infinity, but came as {sinks}; -inf is for no sink.")
    # Where they are traced: a row whose maximum is infinite would be NaN in the online softmax.
    return jnp.minimum(sinks, jnp.finfo(jnp.float32).max)
