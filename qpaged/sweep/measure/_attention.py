"""Measures what a format does to the attention of each layer by itself.

A plain run goes ahead. Each layer's queries, keys and values of that run are also given to the measured
cache, so that a layer's error is its own and does not include the errors of earlier layers.
"""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from qpaged.arrays import invert_output, to_float32, transform_query, untransformed
from qpaged.cache import PagedAttentionCacheView
from qpaged.models import AttentionOptions
from qpaged.pools import Pages, gather_slots
from qpaged.sweep.measure._statistics import Statistic, divergence, jackknife

SUMS = ("output", "error", "error_keys", "error_values", "kl", "rows")
"""What :func:`compare_attention` sums: squared outputs, squared errors, KL, and rows that attend at all."""

LayerEstimates = tuple[list[float], list[float | None]]


@dataclass(frozen=True)
class AttentionProfile:
    """Errors of attention for each layer; each list is followed by its standard errors.

    Attributes:
        error: ||out - plain out|| / ||plain out||, over all tokens, heads and channels.
        error_keys: the same error if only the keys are stored in the format.
        error_values: the same error if only the values are stored in the format.
        kl: sum of p log(p / q) over the positions attended to, nats, mean over tokens and heads. It depends
            on the keys alone.
    """

    error: list[float]
    error_se: list[float | None]
    error_keys: list[float]
    error_keys_se: list[float | None]
    error_values: list[float]
    error_values_se: list[float | None]
    kl: list[float]
    kl_se: list[float | None]

    @classmethod
    def of(cls, sums: np.ndarray) -> "AttentionProfile":
        """Compute the errors from sums [layers, units, :data:`SUMS`].

        Raises:
            ValueError: the sums are not finite.
        """
        if not np.isfinite(sums).all():
            raise ValueError("the errors of attention are not finite; its keys or values may be too large")
        return cls(
            *_relative_errors(sums, "error"),
            *_relative_errors(sums, "error_keys"),
            *_relative_errors(sums, "error_values"),
            *_mean_kl(sums),
        )


@functools.partial(jax.jit, static_argnames=("options",))
def compare_attention(
    plain: PagedAttentionCacheView,
    view: PagedAttentionCacheView,
    query: jax.Array,  # [tokens, q_heads, head_dim]
    position: jax.Array,  # [tokens] int32, negative for padding
    table: jax.Array,  # [pages] int32, the sequence's pages
    options: AttentionOptions,
) -> jax.Array:  # [6] float32
    """Return :data:`SUMS` over a prefill's tokens; both views hold the prefill of one layer already."""
    kv_heads = plain.metadata.num_kv_heads
    group = query.shape[1] // kv_heads
    copies = slice(None, None, plain.key_pages.shape[0] // kv_heads)  # one of a head that is stored again
    attended = _attended(position, len(table) * plain.metadata.page_size, options.sliding_window)
    attended = jnp.repeat(attended, group, axis=0)  # [tokens * group, slots]

    # Codes are compared as attention reads them: a format may change the query instead of the keys, and the
    # output instead of the values (as +rotate does).
    measured_query = transform_query(query.astype(jnp.float32), view.key_pages)
    operands = (
        _by_kv_head(query.astype(jnp.float32), kv_heads),
        _slots(plain.key_pages, table)[copies],
        _slots(plain.value_pages, table)[copies],
        _by_kv_head(measured_query, kv_heads),
        _slots(untransformed(view.key_pages), table)[copies],
        _slots(untransformed(view.value_pages), table)[copies],
    )

    def sums_of_head(operands: tuple[jax.Array, ...]) -> jax.Array:
        query, key, value, measured_query, measured_key, measured_value = operands
        log_p = _log_weights(query, key, attended, options)
        log_q = _log_weights(measured_query, measured_key, attended, options)
        p, q = jnp.exp(log_p), jnp.exp(log_q)
        output = _mix(p, value)
        error = invert_output(_mix(q, measured_value), view.value_pages) - output
        error_keys = _mix(q, value) - output
        error_values = invert_output(_mix(p, measured_value), view.value_pages) - output
        attends = attended.any(axis=-1)  # padding attends to nothing
        kl = jnp.where(attends, divergence(log_p, log_q), 0)
        return jnp.stack(
            [
                jnp.square(output).sum(),
                jnp.square(error).sum(),
                jnp.square(error_keys).sum(),
                jnp.square(error_values).sum(),
                kl.sum(),
                attends.sum(dtype=jnp.float32),
            ]
        )

    # One head at a time, since the weights of all heads would be large.
    return lax.map(sums_of_head, operands).sum(axis=0)


def _relative_errors(sums: np.ndarray, name: str) -> LayerEstimates:
    """Return the relative error of each layer, the root of a ratio of squares."""
    squares, reference = SUMS.index(name), SUMS.index("output")

    def statistic(total: np.ndarray) -> float:
        return np.sqrt(_ratio(total[squares], total[reference]))

    return _by_layer(sums, statistic)


def _mean_kl(sums: np.ndarray) -> LayerEstimates:
    """Return the KL of each layer's attention weights, a mean over rows."""
    kl, rows = SUMS.index("kl"), SUMS.index("rows")

    def statistic(total: np.ndarray) -> float:
        return _ratio(total[kl], total[rows])

    return _by_layer(sums, statistic)


def _by_layer(sums: np.ndarray, statistic: Statistic) -> LayerEstimates:
    values: list[float] = []
    errors: list[float | None] = []
    for units in sums:
        value, error = jackknife(units, statistic)
        assert value is not None
        values.append(value)
        errors.append(error)
    return values, errors


def _ratio(numerator: float, denominator: float) -> float:
    """Return the quotient, or 0 where there is nothing to divide by."""
    if not denominator:
        return 0.0
    return numerator / denominator


def _attended(position: jax.Array, slots: int, sliding_window: int | None) -> jax.Array:
    """Return the mask [tokens, slots] of the slots that each token attends to."""
    slot = jnp.arange(slots)
    attended = (slot <= position[:, None]) & (position[:, None] >= 0)
    if sliding_window is not None:
        attended &= slot > position[:, None] - sliding_window
    return attended


def _by_kv_head(query: jax.Array, kv_heads: int) -> jax.Array:
    """Reshape [tokens, q_heads, head_dim] to [kv_heads, tokens * group, head_dim]."""
    tokens, _, head_dim = query.shape
    return query.reshape(tokens, kv_heads, -1, head_dim).swapaxes(0, 1).reshape(kv_heads, -1, head_dim)


def _slots(pool: Pages, table: jax.Array) -> jax.Array:
    """Return a sequence's pages as float32 [kv_heads, slots, head_dim]."""
    return to_float32(gather_slots(pool, table))


def _log_weights(
    query: jax.Array,  # [queries, head_dim]
    key: jax.Array,  # [slots, head_dim]
    attended: jax.Array,  # [queries, slots]
    options: AttentionOptions,
) -> jax.Array:  # [queries, slots]
    """Return the log softmax of the scores, -inf where nothing is attended to."""
    scores = options.softmax_scale * jnp.matmul(query, key.T, precision="highest")
    if options.logits_soft_cap is not None:
        scores = options.logits_soft_cap * jnp.tanh(scores / options.logits_soft_cap)
    log_p = jax.nn.log_softmax(jnp.where(attended, scores, -jnp.inf), axis=-1)
    return jnp.where(attended, log_p, -jnp.inf)  # a row without any slot is NaN after the softmax


def _mix(weights: jax.Array, value: jax.Array) -> jax.Array:
    return jnp.matmul(weights, value, precision="highest")
