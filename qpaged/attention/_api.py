"""paged_attention: one function for decode and prefill, on whichever backend."""

import dataclasses
import functools
import math
import operator
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from qpaged._compat import automatic, explicit_sharding
from qpaged.arrays import QuantizedArray, contracted, float_dtype, weighed
from qpaged.attention import _backends
from qpaged.attention._backends import BACKENDS, AttentionBackend
from qpaged.attention._options import Options, QueryTokens
from qpaged.cache import PagedAttentionCacheView, PagedAttentionMetadata
from qpaged.cache._config import LARGEST_INDEX
from qpaged.implicit import ImplicitArray, use_implicit_args


def attention_backends(
    query: Any = None,
    view: PagedAttentionCacheView | None = None,
    metadata: PagedAttentionMetadata | None = None,
) -> tuple[AttentionBackend, ...]:
    """All backends, in the order in which :func:`paged_attention` prefers them.

    Args:
        query: with ``view`` and ``metadata``, as :func:`paged_attention` takes them: the backends that do not
            take this call say why. Shapes are enough (``jax.eval_shape``'s).
        view: likewise.
        metadata: likewise.

    Raises:
        TypeError, ValueError: arguments that :func:`paged_attention` does not take, or not all three.
    """
    given = [argument is not None for argument in (query, view, metadata)]
    if not any(given):
        return _backends.listed([])
    if not all(given):
        raise TypeError("attention_backends takes query, view and metadata together, or none of them.")
    found: list[tuple[AttentionBackend, ...]] = []

    def trace(query, view, metadata):
        parts = _tokens(jnp.asarray(query), view, metadata)
        found.append(
            _backends.listed([_stored(part, view.key_pages, view.value_pages)[:3] for part in parts])
        )

    jax.eval_shape(trace, query, view, metadata)
    return found[0]


def paged_attention(
    query: Any,
    view: PagedAttentionCacheView,
    metadata: PagedAttentionMetadata,
    *,
    softmax_scale: float | None = None,
    sliding_window: int | None = None,
    logits_soft_cap: float | None = None,
    sinks: Any = None,
    backend: str | None = None,
) -> jax.Array:
    """Attention of queries over the pages of their sequences, causal, with grouped-query heads.

    A query at position p attends to the slots 0 to p of its sequence, p included, in float32
    accumulation: softmax(softmax_scale · q·k) · v. Write its keys and values first.

    Args:
        query: (batch, q_heads, head_dim) in a decode, (padded_len, q_heads, head_dim) in a prefill, and the
            prefill's tokens followed by the decode's rows where ``metadata`` carries both.
        view: the layer's pages.
        metadata: positions and page tables.
        softmax_scale: factor of the dot products; 1 / sqrt(head_dim) if None.
        sliding_window: attend to the last so many positions, the query's own included; to all if None.
        logits_soft_cap: scores become cap · tanh(score / cap) (Gemma 2); untouched if None.
        sinks: (q_heads,) logits that join each head's softmax and carry no value (gpt-oss); none if None.
        backend: the name of one of :func:`attention_backends`, which never falls back. None for the first of
            them that takes the call and is for the platform that the program is lowered for, be it there or
            not. Only ``reference`` can be differentiated in reverse.

    Returns:
        (as query) in the query's dtype; zeros for padding and for inactive rows.

    Raises:
        TypeError, ValueError: a shape, dtype or option other than these, or a backend that declines the call.
    """
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, or None, but came as {backend!r}.")
    query = jnp.asarray(query)
    parts = _tokens(query, view, metadata)
    options = _options(view, softmax_scale, sliding_window, logits_soft_cap)
    sinks = None if sinks is None else _sinks(sinks, query.shape[1])
    attend = _backends.attend if backend is None else functools.partial(_on, backend)

    def run(keys, values, parts, sinks):
        outs = [_attend(attend, tokens, keys, values, sinks, options) for tokens in parts]
        return jnp.concatenate(outs).astype(query.dtype)

    if not parts:
        return jnp.zeros_like(query)
    pools = view.key_pages, view.value_pages
    if any(isinstance(pool, ImplicitArray) and not isinstance(pool, QuantizedArray) for pool in pools):
        return use_implicit_args(lambda keys, values: run(keys, values, parts, sinks))(*pools)
    placed = [explicit_sharding(leaf) for leaf in jax.tree_util.tree_leaves(pools)]
    if any(sharding is None for sharding in placed):
        return run(pools[0], pools[1], parts, sinks)
    over_heads = PartitionSpec(None, placed[0].spec[0], None)  # as the pools' heads are
    return automatic(run, placed[0].update(spec=over_heads))(pools[0], pools[1], parts, sinks)


def _on(backend: str, tokens: QueryTokens, keys: Any, values: Any, sinks: Any, options: Options) -> jax.Array:
    """Attention on the backend of that name and no other."""
    entry = BACKENDS[backend]
    reason = _backends.reason(entry, [(tokens, keys, values)])
    if reason is not None:
        raise ValueError(
            f"backend must be one that takes the call, but {backend!r} declines: it {reason}. "
            f"Leave it None for the first that does, or see qpaged.attention_backends."
        )
    return entry.attend(tokens, keys, values, sinks, options)


def _attend(attend, tokens: QueryTokens, keys: Any, values: Any, sinks: Any, options: Options) -> jax.Array:
    """One backend on one kind of tokens, over what the pages hold."""
    if not tokens.query.size or not tokens.table.shape[-1]:
        return jnp.zeros(tokens.query.shape, jnp.float32)
    tokens, keys, values, restored = _stored(tokens, keys, values)
    return restored(attend(tokens, keys, values, sinks, options))


def _stored(tokens: QueryTokens, keys: Any, values: Any) -> tuple[QueryTokens, Any, Any, Any]:
    """The call that a backend gets, and what makes its output the caller's: formats that transform channels
    have the query and the output transformed, never the cache."""
    query, keys = contracted(tokens.query, keys)
    values, restored = weighed(values)
    return dataclasses.replace(tokens, query=query), keys, values, restored


def _tokens(
    query: jax.Array, view: PagedAttentionCacheView, metadata: PagedAttentionMetadata
) -> list[QueryTokens]:
    """The prefill's tokens and the decode's rows, whichever there are, with their queries."""
    config = view.metadata
    parts = [part for part in (metadata.prefill_tokens(), metadata.decodes_tokens()) if part is not None]
    _check_query(query, sum(len(position) for position, _ in parts) if parts else None, config)
    tokens, start = [], 0
    for position, table in parts:
        table = table[..., : LARGEST_INDEX // config.page_size]  # no int32 position lies further
        position = jnp.where(position < table.shape[-1] * config.page_size, position, -1)
        tokens.append(QueryTokens(query[start : start + len(position)], position, table))
        start += len(position)
    return tokens


def _check_query(query: jax.Array, rows: int | None, config: Any) -> None:
    float_dtype("query", query.dtype)
    heads, head_dim = config.num_kv_heads, config.kv_head_dim_size
    right = query.ndim == 3 and query.shape[2] == head_dim and query.shape[1] and query.shape[1] % heads == 0
    if not right or rows not in (None, len(query)):
        raise ValueError(
            f"query must have shape (tokens, q_heads, head_dim) with {'any' if rows is None else rows} "
            f"tokens, as the metadata says, q_heads a multiple of the {heads} KV heads, and head_dim "
            f"{head_dim}, but came with shape {query.shape}."
        )


def _options(view: PagedAttentionCacheView, scale: Any, window: Any, cap: Any) -> Options:
    config = view.metadata
    scale = 1 / math.sqrt(config.kv_head_dim_size) if scale is None else float(scale)
    if window is not None:
        window = operator.index(window)
        if window < 1:
            raise ValueError(
                f"sliding_window must be at least 1, or None for no window, but came as {window}."
            )
        window = None if window >= LARGEST_INDEX else window
    if cap is not None and not 0 < cap < math.inf:
        raise ValueError(
            f"logits_soft_cap must be positive and finite, or None for no cap, but came as {cap}."
        )
    return Options(scale, window, cap if cap is None else float(cap), config.num_pages_per_layer)


def _sinks(sinks: Any, q_heads: int) -> jax.Array:
    sinks = jnp.asarray(sinks)
    if sinks.shape != (q_heads,):
        raise ValueError(
            f"sinks must have shape (q_heads,) = ({q_heads},), but came with shape {sinks.shape}."
        )
    return sinks.astype(jnp.float32)
