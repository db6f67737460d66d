"""Statistics of per-token values: estimates with standard errors, KL divergence, and its histogram."""

from collections.abc import Callable
from typing import NamedTuple, TypedDict

import jax
import jax.numpy as jnp
import numpy as np

MIN_UNITS = 8
"""Standard errors are taken over sequences; fewer sequences than this are cut into shorter stretches."""

POSITIONS = 8
"""Parts of equal length of a sequence, from its first token to its last."""

KL_EDGES = np.arange(-12, 2.01, 0.25)
"""Edges of the histogram of KL, as log10 of nats."""

Statistic = Callable[[np.ndarray], float]
"""statistic(sums) computes a number from the sums of some per-token values over all tokens."""


class Estimate(NamedTuple):
    """A number and its standard error; an error is None where it is unknown."""

    value: float | None
    error: float | None = None


class Histogram(TypedDict):
    """Counts of values between edges, which are log10 of nats; ``below`` counts what precedes the first."""

    log10_edges: list[float]
    counts: list[int]
    below: int


def token_estimate(statistic: Statistic, *values: np.ndarray) -> Estimate:
    """Estimate a statistic of per-token values, each [sequences, tokens], and its standard error."""
    return jackknife(stretches(*values), statistic)


def stretches(*values: np.ndarray) -> np.ndarray:
    """Sum per-token values [sequences, tokens] over each sequence, or part of one, to [units, values]."""
    sequences, tokens = values[0].shape
    parts = min(-(-MIN_UNITS // sequences), tokens)
    stacked = np.stack(values, axis=-1).astype(np.float64)
    return np.concatenate([part.sum(axis=1) for part in np.array_split(stacked, parts, axis=1)])


def part_means(values: np.ndarray) -> list[float]:
    """Return the mean of per-token values over each part that :func:`stretches` cuts."""
    sums = stretches(values, np.ones_like(values))
    return (sums[:, 0] / sums[:, 1]).tolist()


def by_position(values: np.ndarray) -> list[Estimate]:
    """Return the mean of per-token values [sequences, tokens] in each part of sequences."""
    parts = np.array_split(values, min(POSITIONS, values.shape[1]), axis=1)
    return [token_estimate(lambda sums: sums[0] / sums[1], part, np.ones_like(part)) for part in parts]


def jackknife(sums: np.ndarray, statistic: Statistic) -> Estimate:
    """Estimate a smooth statistic of the total of ``sums`` [units, values] (Tukey, 1958).

    The error is None for a single unit, and where leaving out a unit leaves nothing to divide by.
    """
    total, units = sums.sum(axis=0), len(sums)
    value = float(statistic(total))
    if units < 2:
        return Estimate(value)
    with np.errstate(all="ignore"):  # Leaving out a unit may divide by zero, which is checked below.
        leave_one_out = np.array([statistic(total - unit) for unit in sums])
    if not np.isfinite(leave_one_out).all():
        return Estimate(value)
    return Estimate(value, float(np.sqrt((units - 1) * leave_one_out.var())))


def divergence(log_p: jax.Array, log_q: jax.Array) -> jax.Array:
    """Return the KL divergence of q from p over the last axis, in nats.

    With d = log p - log q, it is summed as p (d + exp(-d) - 1). That is the same sum, since p and q both sum
    to 1, but its terms are never negative, so that nearly equal distributions are not lost to cancellation.
    Where p is 0, the term is q.
    """
    p, q = jnp.exp(log_p), jnp.exp(log_q)
    has_mass = log_p > -jnp.inf
    d = jnp.where(has_mass, log_p - log_q, 0)
    near = jnp.where(has_mass, p * (d + jnp.expm1(-jnp.maximum(d, -1))), q)
    far = p * (d - 1) + q  # For d below -1 exp(-d) may overflow; p exp(-d) is q.
    return jnp.where(d > -1, near, far).sum(axis=-1)


def kl_histogram(kl: np.ndarray) -> Histogram:
    """Count how many values lie between :data:`KL_EDGES`, or below them; the last bin is open."""
    lowest = 10.0 ** KL_EDGES[0]
    inside = np.log10(kl[kl >= lowest]).clip(max=KL_EDGES[-1])
    counts, _ = np.histogram(inside, KL_EDGES)
    return {
        "log10_edges": KL_EDGES.tolist(),
        "counts": counts.tolist(),
        "below": int((kl < lowest).sum()),
    }
