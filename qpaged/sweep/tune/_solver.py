"""Solves for the best choice of formats by dynamic programming over bits.

It is a knapsack problem: each layer's keys and each layer's values are an item that takes one of the
candidates, which costs bits and adds its sensitivity to the predicted KL.
"""

import math
from fractions import Fraction
from typing import TypeAlias

import numpy as np

from qpaged.sweep.tune._budget import UnattainableError

FINEST_GRID = 2**14
"""The largest denominator of the fractions that bits are counted in."""

COARSE_GRID = 256
"""Parts of a bit that bits are rounded up to where they cannot be counted exactly."""

Choice: TypeAlias = tuple[tuple[int, int], ...]
"""For each layer the candidates of its keys and of its values, by index."""


def choose(
    bits: np.ndarray,  # [candidates] bits per element
    sensitivity: np.ndarray,  # [layers, 2, candidates] KL of each candidate alone
    max_bits: float,
    max_kl: float,
) -> tuple[Choice, float]:
    """Return the choice with the least sum of sensitivities within ``max_bits``, and that sum.

    Where ``max_kl`` is finite, return the choice of the fewest bits that keeps both bounds instead.

    Raises:
        UnattainableError: no choice keeps the bounds.
    """
    layers, sides, candidates = sensitivity.shape
    items = sensitivity.reshape(layers * sides, candidates)
    cost, grid = _integer_cost(bits)
    extra = cost - cost.min()  # what a candidate costs beyond the cheapest one
    room = len(items) * extra.max()
    if max_bits < math.inf:
        # The small term keeps a budget of exactly the candidates' bits from being rounded down.
        allowed = math.floor(max_bits * grid * len(items) + 1e-6)
        room = min(room, allowed - len(items) * cost.min())
    if room < 0:
        raise too_few_bits(float(bits.min()), "the smallest of the formats", max_bits)
    least, picks = _least_sums(items, extra, room)
    (affordable,) = np.nonzero(least <= max_kl)
    if not len(affordable):
        within = f" within {max_bits:g} bits" if max_bits < math.inf else ""
        raise UnattainableError(
            "max_kl",
            f"must be at least about {least[-1]:.2g}, what the closest choice of these formats has{within}, "
            f"but came as {max_kl:.2g}; allow more, or give more accurate formats.",
        )
    # The least sum never rises with what may be spent, so that the first that suffices is the cheapest.
    spent = affordable[0] if max_kl < math.inf else room
    chosen = _trace_back(picks, extra, spent)
    total = sum(kl[candidate] for kl, candidate in zip(items, chosen, strict=True))
    return tuple(zip(chosen[0::2], chosen[1::2], strict=True)), float(total)


def too_few_bits(least: float, spelling: str, max_bits: float) -> UnattainableError:
    """Return the error for a bound below what the smallest format takes."""
    return UnattainableError(
        "bits",
        f"must be at least {least:.3f}, what {spelling} takes, but came as {max_bits:g}; give more bits, or "
        f"a smaller format.",
    )


def _integer_cost(bits: np.ndarray) -> tuple[np.ndarray, int]:
    """Return bits as integers, and how many parts of one bit they count; a coarse grid rounds up."""
    fractions = [Fraction(value).limit_denominator(FINEST_GRID) for value in bits.tolist()]
    grid = math.lcm(*(fraction.denominator for fraction in fractions))
    if grid > FINEST_GRID:
        grid = COARSE_GRID
    return np.array([math.ceil(fraction * grid) for fraction in fractions]), grid


def _least_sums(
    items: np.ndarray,  # [items, candidates]
    extra: np.ndarray,  # [candidates]
    room: int,
) -> tuple[np.ndarray, np.ndarray]:  # [room + 1], [items, room + 1]
    """Return the least sum within each extra cost, and the candidate that each item takes there."""
    # least[c] is the least sum of the items so far within c parts beyond the cheapest candidates.
    least = np.zeros(room + 1)
    picks = np.empty((len(items), room + 1), np.int16)
    for item, kl in enumerate(items):
        options = np.full((len(extra), room + 1), np.inf)
        for candidate in np.flatnonzero(extra <= room):
            cost = extra[candidate]
            options[candidate, cost:] = least[: room + 1 - cost] + kl[candidate]
        picks[item] = options.argmin(axis=0)
        least = options.min(axis=0)
    return least, picks


def _trace_back(picks: np.ndarray, extra: np.ndarray, left: int) -> list[int]:
    """Return the candidate of each item in the solution that has ``left`` to spend."""
    chosen = []
    for item in reversed(range(len(picks))):
        candidate = int(picks[item, left])
        chosen.append(candidate)
        left -= extra[candidate]
    return chosen[::-1]
