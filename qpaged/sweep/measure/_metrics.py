"""What a cache does to a model's predictions."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

UNITS = 8
"""Standard errors are taken over sequences, or over at least so many stretches where these are fewer."""

PERCENTILES = {"kl_median": 50, "kl_p90": 90, "kl_p99": 99, "kl_p999": 99.9, "kl_max": 100}

KL_EDGES = np.arange(-12, 2.01, 0.25)
"""Edges of the histogram of KL, as log10 of nats."""


class Predictions(NamedTuple):
    """How a token was predicted beside how the reference predicted it; arrays of one shape.

    Attributes:
        kl: sum over the vocabulary of p log(p / q), nats; p is the reference's.
        log_p: of the token that came, by the reference.
        log_q: of the token that came.
        same_top: whether both held the same token for the likeliest.
    """

    kl: Any
    log_p: Any
    log_q: Any
    same_top: Any


@dataclass(frozen=True)
class Accuracy:
    """Predictions of a run beside those of the reference.

    KL in nats a token; ``kl_parts`` are the means of the parts of the text, most often sequences, over which
    standard errors are taken by the jackknife. Each mean is followed by its own.
    """

    bits_per_byte: float
    bits_per_byte_se: float | None
    perplexity: float
    perplexity_se: float | None
    perplexity_ratio: float
    perplexity_ratio_se: float | None
    kl_mean: float
    kl_mean_se: float | None
    kl_median: float
    kl_p90: float
    kl_p99: float
    kl_p999: float
    kl_max: float
    kl_parts: list[float]
    probability_change_rms: float
    probability_change_rms_se: float | None
    same_top: float
    same_top_se: float | None
    kl_histogram: dict[str, Any]


class Sums(NamedTuple):
    """Sums over tokens: of ones, bytes, KL, -log q, log p - log q, squared changes of p, agreements."""

    tokens: float
    bytes: float
    kl: float
    nats: float
    excess: float
    change: float
    same_top: float


@jax.jit
def compare(reference: jax.Array, logits: jax.Array, truth: jax.Array) -> Predictions:
    """Each prediction beside the reference's, in float32.

    With d = log p - log q, KL is summed as p (d + exp(-d) - 1): the same sum, since p and q both sum to 1,
    but of terms that are never negative, so that nearly equal predictions are not lost to cancellation.

    Args:
        reference: (..., vocabulary).
        logits: (..., vocabulary).
        truth: (...) integers, what came next.
    """
    log_p, log_q = (jax.nn.log_softmax(x.astype(jnp.float32), axis=-1) for x in (reference, logits))
    p_true, q_true = (jnp.take_along_axis(x, truth[..., None], axis=-1)[..., 0] for x in (log_p, log_q))
    same = reference.argmax(axis=-1) == logits.argmax(axis=-1)
    return Predictions(divergence(log_p, log_q), p_true, q_true, same)


def divergence(log_p: jax.Array, log_q: jax.Array) -> jax.Array:
    """sum p (d + exp(-d) - 1) with d = log p - log q over the last axis; where p is 0, q."""
    p, q, seen = jnp.exp(log_p), jnp.exp(log_q), log_p > -jnp.inf
    d = jnp.where(seen, log_p - log_q, 0)
    near = p * (d + jnp.expm1(-jnp.maximum(d, -1)))
    return jnp.where(d > -1, jnp.where(seen, near, q), p * (d - 1) + q).sum(axis=-1)  # exp(-d) would overflow


def measure_accuracy(found: Predictions, widths: np.ndarray) -> Accuracy:
    """The summary of all predictions, each (sequences, tokens).

    Args:
        widths: (sequences, tokens): bytes that each predicted token stands for.

    Raises:
        ValueError: predictions that are not finite.
    """
    kl, log_p, log_q = (np.asarray(x, np.float64) for x in found[:3])
    if not (np.isfinite(kl).all() and np.isfinite(log_q).all()):
        raise ValueError("the model's logits are not finite")
    change = np.square(np.exp(log_q) - np.exp(log_p))
    units = stretches(np.ones_like(kl), widths, kl, -log_q, log_p - log_q, change, found.same_top)

    averages: dict[str, Callable[[Sums], float]] = {
        "bits_per_byte": lambda s: s.nats / s.bytes / np.log(2),
        "perplexity": lambda s: np.exp(s.nats / s.tokens),
        "perplexity_ratio": lambda s: np.exp(s.excess / s.tokens),
        "kl_mean": lambda s: s.kl / s.tokens,
        "probability_change_rms": lambda s: np.sqrt(s.change / s.tokens),
        "same_top": lambda s: s.same_top / s.tokens,
    }
    values: dict[str, Any] = dict(
        zip(PERCENTILES, np.percentile(kl, list(PERCENTILES.values())).tolist(), strict=True)
    )
    for name, statistic in averages.items():
        values[name], values[f"{name}_se"] = jackknife(units, lambda total, of=statistic: of(Sums(*total)))  # type: ignore[misc]
    parts = [kl / tokens for tokens, kl in units[:, [0, 2]].tolist()]
    return Accuracy(**values, kl_parts=parts, kl_histogram=histogram(kl))


def histogram(kl: np.ndarray) -> dict[str, Any]:
    """How many values lie between the edges, log10 of nats, or ``below`` them; the last bin is open."""
    below = int((kl < 10.0 ** KL_EDGES[0]).sum())
    counts, _ = np.histogram(np.log10(kl[kl >= 10.0 ** KL_EDGES[0]]).clip(max=KL_EDGES[-1]), KL_EDGES)
    return {"log10_edges": KL_EDGES.tolist(), "counts": counts.tolist(), "below": below}


def stretches(*values: np.ndarray) -> np.ndarray:
    """(units, values): sums over each sequence of arrays (sequences, tokens), or over stretches of it."""
    parts = min(-(-UNITS // len(values[0])), values[0].shape[1])
    cut = np.array_split(np.stack(values, axis=-1).astype(np.float64), parts, axis=1)
    return np.concatenate([part.sum(axis=1) for part in cut])


def jackknife(sums: np.ndarray, statistic: Callable[[np.ndarray], float]) -> tuple[float, float | None]:
    """A smooth statistic of the total of ``sums`` (units, values), and its standard error (Tukey, 1958).

    None where that cannot be told: of a single unit, or where one holds all there is.
    """
    total, units = sums.sum(axis=0), len(sums)
    if units < 2:
        return float(statistic(total)), None
    with np.errstate(all="ignore"):  # a part may hold all there is of something
        rest = np.array([statistic(total - part) for part in sums])
    error = np.sqrt((units - 1) * rest.var()) if np.isfinite(rest).all() else None
    return float(statistic(total)), error if error is None else float(error)
