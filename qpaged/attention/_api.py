"""paged_attention: one function for decode and prefill, on whichever backend."""

import dataclasses
import math
import operator
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from qpaged._compat import automatic, explicit_sharding
from qpaged.arrays import QuantizedArray, contracted, float_dtype, weighed
from qpaged.attention import _reference, _xla
from qpaged.attention._options import Options, Tokens
from qpaged.cache import PagedAttentionCacheView, PagedAttentionMetadata
from qpaged.cache._config import LARGEST_INDEX
from qpaged.implicit import ImplicitArray, use_implicit_args

BACKENDS = {"xla": _xla.attend, "reference": _reference.attend}  # the default first


def attention_backends() -> tuple[str, ...]:
    """Names of the backends, the default first."""
    return tuple(BACKENDS)


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
        backend: the name of one; ``xla`` if None. A backend asked for by name never falls back. Only
            ``reference`` can be differentiated in reverse.

    Returns:
        (as query) in the query's dtype; zeros for padding and for inactive rows.

    Raises:
        TypeError, ValueError: a shape, dtype or option other than these.
    """
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, or None, but came as {backend!r}.")
    query = jnp.asarray(query)
    parts = _tokens(query, view, metadata)
    options = _options(view, softmax_scale, sliding_window, logits_soft_cap)
    sinks = None if sinks is None else _sinks(sinks, query.shape[1])
    attend = BACKENDS[backend or "xla"]

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


def _attend(attend, tokens: Tokens, keys: Any, values: Any, sinks: Any, options: Options) -> jax.Array:
    """One backend on one kind of tokens, over what the pages hold: formats that transform channels have the
    query and the output transformed, never the cache."""
    if not tokens.query.size or not tokens.table.shape[-1]:
        return jnp.zeros(tokens.query.shape, jnp.float32)
    query, keys = contracted(tokens.query, keys)
    values, restored = weighed(values)
    return restored(attend(dataclasses.replace(tokens, query=query), keys, values, sinks, options))


def _tokens(
    query: jax.Array, view: PagedAttentionCacheView, metadata: PagedAttentionMetadata
) -> list[Tokens]:
    """The prefill's tokens and the decode's rows, whichever there are, with their queries."""
    config = view.metadata
    parts = [part for part in (metadata.prefill_tokens(), metadata.decodes_tokens()) if part is not None]
    _check_query(query, sum(len(position) for position, _ in parts) if parts else None, config)
    tokens, start = [], 0
    for position, table in parts:
        table = table[..., : LARGEST_INDEX // config.page_size]  # no int32 position lies further
        position = jnp.where(position < table.shape[-1] * config.page_size, position, -1)
        tokens.append(Tokens(query[start : start + len(position)], position, table))
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
