"""Checks of what :func:`paged_attention` is given."""

import math
import operator
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from qpaged._arguments import as_array, shown
from qpaged.arrays import dtype_of_floats
from qpaged.attention._new_tokens import NewTokens, are_consecutive
from qpaged.attention._options import Options
from qpaged.cache import PagedAttentionCacheMetaData
from qpaged.cache._config import LARGEST_INDEX
from qpaged.cache._slot_mapping import as_indices

LARGEST_SCALE = 2.0**16
LEAST_CAP = float(jnp.finfo(jnp.float32).tiny)  # a smaller one would become 0, and scores over it NaN
LARGEST_CAP = 1e30  # scores under 1e-8 over it would be subnormal, and become zeros


def check_dimensions(query: jax.Array) -> None:
    """Raise unless the query is of floats, and has three axes."""
    dtype_of_floats("query", query.dtype)
    if query.ndim != 3:
        raise ValueError(
            f"query must have shape (tokens, q_heads, head_dim), but came with shape {query.shape}."
        )


def check_query(
    query: jax.Array, count: int | None, config: PagedAttentionCacheMetaData, kv_heads: int
) -> None:
    """Raise unless the query has ``count`` tokens, any number if None, of the cache's head size."""
    tokens, q_heads, head_dim = query.shape
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


def checked_window(window: ArrayLike | None) -> int | jax.Array | None:
    """Return a sliding window, None for one that all slots are in, or raise what is wrong with it."""
    if window is None:
        return None
    if isinstance(window, jax.core.Tracer):
        traced = as_indices("sliding_window", window)
        if traced.ndim:
            raise ValueError(
                f"sliding_window must be one integer, but came with shape {traced.shape}; in a scan over "
                f"layers, give that of the layer."
            )
        return traced
    try:
        known = operator.index(window)  # type: ignore[arg-type]
    except TypeError as error:
        raise TypeError(
            f"sliding_window must be an integer, or None for no window, but came as {window!r}."
        ) from error
    if known < 1:
        raise ValueError(f"sliding_window must be at least 1, or None for no window, but came as {known}.")
    return None if known >= LARGEST_INDEX else known  # which no position reaches


def checked_until(visible_until: ArrayLike, tokens: int) -> jax.Array:
    """Return the last positions that queries see as int32, or raise what is wrong with them."""
    until = as_indices("visible_until", visible_until)
    if until.shape != (tokens,):
        raise ValueError(
            f"visible_until must have shape (tokens,) = ({tokens},), but came with shape {until.shape}; give "
            f"-1 for the queries that see up to their own position."
        )
    return until


def checked_slopes(slopes: ArrayLike, q_heads: int) -> jax.Array:
    """Return ALiBi slopes as float32, or raise what is wrong with them."""
    slopes = as_array("alibi_slopes", slopes)
    dtype_of_floats("alibi_slopes", slopes.dtype)
    if slopes.shape != (q_heads,):
        raise ValueError(
            f"alibi_slopes must have shape (q_heads,) = ({q_heads},), but came with shape {slopes.shape}."
        )
    if not isinstance(slopes, jax.core.Tracer) and not np.all(np.isfinite(np.asarray(slopes, np.float32))):
        raise ValueError(f"alibi_slopes must be finite, but came as {slopes}.")
    return slopes.astype(jnp.float32)


def checked_options(
    config: PagedAttentionCacheMetaData, scale: ArrayLike | None, window: int | None, cap: float | None
) -> Options:
    """Return the options of a call, or raise what is wrong with one."""
    scale = 1 / math.sqrt(config.kv_head_dim_size) if scale is None else _as_float("softmax_scale", scale)
    if not abs(scale) <= LARGEST_SCALE:  # nor NaN
        raise ValueError(
            f"softmax_scale must be at most {LARGEST_SCALE} in magnitude, so that float32 tells scores "
            f"apart, but came as {scale}; None is for 1 / sqrt(head_dim)."
        )
    if cap is not None:
        cap = _as_float("logits_soft_cap", cap)
        if not LEAST_CAP <= cap <= LARGEST_CAP:
            raise ValueError(
                f"logits_soft_cap must be from {LEAST_CAP:.3g} to {LARGEST_CAP}, as float32 loses scores "
                f"over any other, but came as {cap}; None is for no cap."
            )
    return Options(scale, window, cap, config.num_pages_per_layer)


def scaled_query(query: jax.Array, scale: jax.Array) -> jax.Array:
    """Return a query times a traced ``softmax_scale``, in its dtype; or raise unless that is a number."""
    if scale.ndim or not jnp.issubdtype(scale.dtype, jnp.floating):
        raise TypeError(
            f"softmax_scale must be one real number, but came as {scale.dtype.name} of shape {scale.shape}."
        )
    return (query.astype(jnp.float32) * scale.astype(jnp.float32)).astype(query.dtype)


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
        f"{value!r:.60}; make it static under jit, or let jax.lax.cond choose between two calls."
    )


def checked_sinks(sinks: ArrayLike, q_heads: int) -> jax.Array:
    """Return sinks as float32, or raise what is wrong with them."""
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


def checked_new(
    new: Sequence[ArrayLike | None], tokens: int, config: PagedAttentionCacheMetaData
) -> NewTokens:
    """Return the keys and values of a call's own tokens, or raise what is wrong with them."""
    if not isinstance(new, tuple | list) or len(new) != 2:
        raise TypeError(f"new must be (key, value), but came as {shown(new)}; give both in a tuple.")
    head_dims = [config.kv_head_dim_size, config.value_dim]
    if config.values_in_keys:
        if new[1] is not None:
            raise ValueError(
                "new[1] must be None for a cache whose values lie in the keys; give the key alone."
            )
        new, head_dims = new[:1], head_dims[:1]
    rows = [as_array(f"new[{index}]", array) for index, array in enumerate(new)]
    for index, (array, head_dim) in enumerate(zip(rows, head_dims, strict=True)):
        shape = (tokens, config.num_kv_heads, head_dim)
        if array.shape != shape:
            raise ValueError(
                f"new[{index}] must have shape (tokens, kv_heads, head_dim) = {shape}, but came with "
                f"shape {array.shape}; give what is written to the view."
            )
        dtype_of_floats(f"new[{index}]", array.dtype)
    return NewTokens(rows[0], rows[-1])  # of a latent, both are the key


def check_consecutive(position: jax.Array | np.ndarray, starts: jax.Array | None) -> None:
    """Raise unless the positions of each sequence, if they are known, follow one another up to padding.

    Args:
        position: [tokens].
        starts: [sequences + 1], the first token of each sequence; None if all are of one.
    """
    if isinstance(position, jax.core.Tracer) or isinstance(starts, jax.core.Tracer):
        return
    position = np.asarray(position)  # slices of a jax.Array would each be compiled
    of_sequences = [position] if starts is None else np.split(position, np.asarray(starts))[1:-1]
    for known in of_sequences:
        if not bool(are_consecutive(known)):
            raise ValueError(
                f"new must be of tokens whose positions follow one another, padding last, but they are at "
                f"{known[:8].tolist()}{' and so on' * (len(known) > 8)}; write first, and attend without new."
            )
