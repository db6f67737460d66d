"""Reads ``results.json`` for the table, the figures, the report and the verdict."""

import math
from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

import numpy as np

from qpaged.sweep._numbers import millions
from qpaged.sweep.measure import Noise
from qpaged.sweep.results._record import VERSION

SECTIONS = ("model", "text", "reference", "settings", "environment", "complete", "runs", "failures")

CONFIDENT_ERRORS = 2
"""Standard errors that a difference must exceed to count: about 95 % confidence."""

BROKEN = 0.5
"""Nats a token: a mean KL beyond which a model no longer says what it did, and no size is a bargain."""

Results: TypeAlias = dict[str, Any]
"""The values of ``results.json``."""

RunRecord: TypeAlias = dict[str, Any]
"""The values of one run in ``results.json``."""


def check(results: Results, fields: Iterable[str]) -> None:
    """Check that results are of this version, and that every run has these fields.

    Raises:
        ValueError: results of another version, missing fields, or results without a run.
    """
    version = results.get("version")
    runs = results.get("runs", [])
    missing = [name for name in SECTIONS if name not in results]
    for name in fields:
        if not all(name in run for run in runs):
            missing.append(f"runs.{name}")
    if version != VERSION or missing:
        without = f" without {', '.join(missing)}" if missing else ""
        raise ValueError(
            f"results must be of version {VERSION} with all its fields, but came as version {version}"
            f"{without}; sweep again with this version of qpaged."
        )
    if not runs:
        raise ValueError("results.runs must hold the reference at least, but is empty; sweep one format.")


def title(results: Results) -> str:
    """Return the model and the text that were measured, as a title."""
    model, tokens = results["model"], results["runs"][0]["tokens"]
    weights = millions(model["parameters"])
    return f"{model['name']} ({weights} parameters) on {results['text']['source']}: {tokens:,} tokens"


def is_broken(run: RunRecord) -> bool:
    """Return True if the format destroys the model: its mean KL is beyond :data:`BROKEN`."""
    return bool(run["kl_mean"] > BROKEN)


def pareto_front(runs: Sequence[RunRecord]) -> list[RunRecord]:
    """Return the runs on the Pareto front of bytes and mean KL, smallest first, without broken ones.

    No other run is both as small and as close as one of them, and better in one of the two.
    """
    front: list[RunRecord] = []
    whole = [run for run in runs if not is_broken(run)]
    for run in sorted(whole, key=lambda run: (run["bytes_per_token"], run["kl_mean"])):
        if not front or run["kl_mean"] < front[-1]["kl_mean"]:
            front.append(run)
    return front


def closest_first(runs: Sequence[RunRecord]) -> list[RunRecord]:
    """Return the reference, then the others by mean KL, then bytes."""
    return [runs[0], *sorted(runs[1:], key=lambda run: (run["kl_mean"], run["bytes_per_token"]))]


def tied(
    kl_parts: Sequence[float], other_kl_parts: Sequence[float], errors: float = CONFIDENT_ERRORS
) -> bool:
    """Return True if two mean KLs differ by at most so many standard errors of their difference.

    The difference is taken part by part of the text, since both formats saw the same text.
    """
    difference = np.subtract(kl_parts, other_kl_parts)
    if len(difference) < 2:
        return not difference.any()
    error = difference.std(ddof=1) / math.sqrt(len(difference))
    return bool(abs(difference.mean()) <= errors * error)


def noise_floor(reference: RunRecord) -> Noise | None:
    """Return what moves the reference most, beside which formats are read; None if nothing is known to."""
    moving = [noise for noise in reference.get("noise") or () if noise["kl_mean"] > 0]
    return max(moving, key=lambda noise: noise["kl_mean"], default=None)


def is_within(run: RunRecord, noise: Noise) -> bool:
    """Return True if a format is no further from the reference than noise, by all that can be told."""
    return run["kl_mean"] <= noise["kl_mean"] or tied(run["kl_parts"], noise["kl_parts"])


def log_floor(values: Iterable[float]) -> float:
    """Return the value at which a logarithmic axis draws 0: a decade below the least positive value."""
    positive = [value for value in values if value > 0]
    if not positive:
        return 1e-6
    return 10.0 ** (math.floor(math.log10(min(positive))) - 1)
