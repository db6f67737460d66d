"""What a format does to the attention of each layer, by itself.

A plain run goes ahead; what each layer's attention is given there, the measured cache is given, too. So a
layer's error is its own, and not what earlier layers handed on.
"""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from qpaged.arrays import QuantizedArray, as_slots, contracted, take_pages, weighed
from qpaged.cache import PagedAttentionCacheView
from qpaged.sweep._metrics import divergence, jackknife

SUMS = ("output", "error", "error_keys", "error_values", "kl", "rows")


@dataclass(frozen=True)
class AttentionProfile:
    """Of each layer; each list is followed by its standard errors.

    Attributes:
        error: ||out - plain out|| / ||plain out||, over all tokens, heads and channels.
        error_keys: likewise, if the keys alone are stored in the format.
        error_values: if the values alone are.
        kl: sum p log(p / q) over the positions attended to, nats, mean over tokens and heads: of the keys.
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
        """From sums (layers, units, :data:`SUMS`).

        Raises:
            ValueError: sums that are not finite.
        """
        if not np.isfinite(sums).all():
            raise ValueError("the errors of attention are not finite; its keys or values may be too large")

        def estimates(name: str) -> tuple[list[float], list[float | None]]:
            part, whole = SUMS.index(name), SUMS.index("rows" if name == "kl" else "output")

            def statistic(total: np.ndarray) -> float:
                ratio = total[part] / total[whole] if total[whole] else 0.0
                return ratio if name == "kl" else np.sqrt(ratio)

            found = [jackknife(units, statistic) for units in sums]
            return [mean for mean, _ in found], [se for _, se in found]

        return cls(
            *estimates("error"), *estimates("error_keys"), *estimates("error_values"), *estimates("kl")
        )


@functools.partial(jax.jit, static_argnames=("options",))
def compare_attention(
    plain: PagedAttentionCacheView,
    view: PagedAttentionCacheView,
    query: jax.Array,
    position: jax.Array,
    table: jax.Array,
    options: Any,
) -> jax.Array:
    """:data:`SUMS` (6,) float32 over a prefill's tokens, one KV head after another.

    Args:
        plain: the layer's plain pages, to which the prefill was written.
        view: its measured ones, likewise.
        query: (tokens, q_heads, head_dim).
        position: (tokens,) int32; negative for padding.
        table: (pages,) int32, of the sequence.
        options: softmax_scale, sliding_window and logits_soft_cap, as :func:`qpaged.paged_attention` has
            them.
    """
    heads = plain.metadata.num_kv_heads
    slot = jnp.arange(len(table) * plain.metadata.page_size)
    seen = (slot <= position[:, None]) & (position[:, None] >= 0)
    if options.sliding_window is not None:
        seen &= slot > position[:, None] - options.sliding_window
    seen = jnp.repeat(seen, query.shape[1] // heads, axis=0)

    measured, keys = contracted(query.astype(jnp.float32), view.key_pages)
    values, restored = weighed(view.value_pages)
    given = (
        _by_head(query.astype(jnp.float32), heads), _slots(plain.key_pages, table),
        _slots(plain.value_pages, table), _by_head(measured, heads), _slots(keys, table),
        _slots(values, table),
    )  # fmt: skip

    def head(given):
        q, k, v, measured, k_stored, v_stored = given
        log_p, log_q = _log_weights(q, k, seen, options), _log_weights(measured, k_stored, seen, options)
        p, q = jnp.exp(log_p), jnp.exp(log_q)
        out = _mix(p, v)
        errors = restored(_mix(q, v_stored)) - out, _mix(q, v) - out, restored(_mix(p, v_stored)) - out
        attends = seen.any(axis=-1)
        kl = jnp.where(attends, divergence(log_p, log_q), 0)
        return jnp.stack(
            [*(jnp.square(x).sum() for x in (out, *errors)), kl.sum(), attends.sum(dtype=jnp.float32)]
        )

    return lax.map(head, given).sum(axis=0)


def _by_head(query: jax.Array, kv_heads: int) -> jax.Array:
    """(tokens, q_heads, head_dim) as (kv_heads, tokens * group, head_dim)."""
    tokens, _, head_dim = query.shape
    return query.reshape(tokens, kv_heads, -1, head_dim).swapaxes(0, 1).reshape(kv_heads, -1, head_dim)


def _slots(pool: Any, table: jax.Array) -> jax.Array:
    """(kv_heads, slots, head_dim) float32 of a sequence's pages."""
    slots = as_slots(take_pages(pool, table))
    return slots.dequantize() if isinstance(slots, QuantizedArray) else slots.astype(jnp.float32)


def _log_weights(query: jax.Array, key: jax.Array, seen: jax.Array, options: Any) -> jax.Array:
    """log softmax (queries, slots) of the scores; -inf where nothing is seen."""
    scores = options.softmax_scale * jnp.matmul(query, key.T, precision="highest")
    if options.logits_soft_cap is not None:
        scores = options.logits_soft_cap * jnp.tanh(scores / options.logits_soft_cap)
    log_p = jax.nn.log_softmax(jnp.where(seen, scores, -jnp.inf), axis=-1)
    return jnp.where(seen, log_p, -jnp.inf)


def _mix(weights: jax.Array, value: jax.Array) -> jax.Array:
    return jnp.matmul(weights, value, precision="highest")
