"""results.json as the report, the figures and the verdict read it: a dict of plain JSON values."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from qpaged.sweep._number import millions

VERSION = 2
SECTIONS = ("model", "text", "reference", "settings", "environment", "complete", "runs", "failures")
SURE = 2
"""Standard errors that a difference must exceed to count: about 95 % confidence."""

Run = dict[str, Any]


def check(results: dict[str, Any], fields: Iterable[str]) -> None:
    """Refuse results that these fields of runs cannot be read from.

    Raises:
        ValueError: a file of another version, or fields that are missing; a sweep without a run.
    """
    version, runs = results.get("version"), results.get("runs", [])
    missing = [name for name in SECTIONS if name not in results]
    missing += [f"runs.{name}" for name in fields if not all(name in run for run in runs)]
    if version != VERSION or missing:
        lacks = f" without {', '.join(missing)}" if missing else ""
        raise ValueError(
            f"results must be of version {VERSION} with all its fields, but came as version {version}{lacks}"
            "; sweep again with this version of qpaged."
        )
    if not runs:
        raise ValueError("results.runs must hold the reference at least, but is empty; sweep one format.")


def title(results: dict[str, Any]) -> str:
    """What was measured on what."""
    model, tokens = results["model"], results["runs"][0]["tokens"]
    weights = millions(model["parameters"])
    return f"{model['name']} ({weights} parameters) on {results['text']['source']}: {tokens:,} tokens"


def pareto_front(runs: Sequence[Run]) -> list[Run]:
    """The runs that no other beats: none is both as small and as close, and better in one; smallest first."""
    front: list[Run] = []
    for run in sorted(runs, key=lambda run: (run["bytes_per_token"], run["kl_mean"])):
        if not front or run["kl_mean"] < front[-1]["kl_mean"]:
            front.append(run)
    return front


def closest_first(runs: Sequence[Run]) -> list[Run]:
    """The reference, then the others by mean KL, then bytes."""
    return [runs[0], *sorted(runs[1:], key=lambda run: (run["kl_mean"], run["bytes_per_token"]))]


def tied(run: Run, other: Run, errors: float = SURE) -> bool:
    """Whether two mean KLs differ by no more than so many standard errors of their difference.

    The difference is taken part by part of the text, since both formats saw the same one.
    """
    difference = np.subtract(run["kl_parts"], other["kl_parts"])
    if len(difference) < 2:
        return not difference.any()
    error = difference.std(ddof=1) / math.sqrt(len(difference))
    return bool(abs(difference.mean()) <= errors * error)


def floor_of(values: Iterable[float]) -> float:
    """Where 0 is drawn on a logarithmic axis: a decade below the least value that has a place there."""
    positive = [value for value in values if value > 0]
    return 10.0 ** (math.floor(math.log10(min(positive))) - 1) if positive else 1e-6
