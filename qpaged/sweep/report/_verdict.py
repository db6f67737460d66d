"""What a sweep found, in words."""

from collections.abc import Sequence
from typing import Any

from qpaged.sweep._number import percent, small
from qpaged.sweep._reading import SURE, Run, check, pareto_front, tied

HALF = 1.9
"""Bytes of bfloat16 over a format's own, from where on it halves the cache; scales take the rest."""
NEARLY_EXACT = 0.01
"""Nats a token: a mean KL that is taken for good enough when nothing else is said."""
NAMES = 3  # formats that a tie names before it counts
FIELDS = (
    "format",
    "bytes_per_token",
    "ratio",
    "bits_per_element",
    "kl_mean",
    "kl_mean_se",
    "kl_parts",
    "same_top",
)


def verdict(results: dict[str, Any]) -> str:
    """One to four sentences on what the formats cost, for a terminal; see :func:`sentences`."""
    return " ".join(sentences(results))


def sentences(results: dict[str, Any]) -> list[str]:
    """What the formats cost, sentence by sentence.

    What is missing comes first; then the closest format that halves the cache; the smallest below
    :data:`NEARLY_EXACT`, and what the next smaller ones cost; last the choice by layer, where there is one.
    Formats whose difference is within the error bars are called tied.

    Args:
        results: results.json.

    Raises:
        ValueError: results of another version.
    """
    check(results, FIELDS)
    reference, *runs = results["runs"]
    smaller = [run for run in runs if run["ratio"] > 1]
    said = [_missing(results)]
    if not smaller:
        said.append(f"No format smaller than bfloat16 was measured beside {reference['format']}.")
    else:
        half = [run for run in smaller if run["ratio"] >= HALF]
        said += [_closest(half or smaller), _smallest(smaller)]
    said.append((results.get("tune") or {}).get("verdict", ""))
    return [sentence for sentence in said if sentence]


def _missing(results: dict[str, Any]) -> str:
    failed = [failure["format"] for failure in results["failures"]]
    count = len(results["runs"])
    parts = [] if results["complete"] else [f"the sweep stopped after {count} format{'s' * (count > 1)}"]
    parts += [f"{_names(failed)} failed"] if failed else []
    return f"Incomplete: {', and '.join(parts)}." if parts else ""


def _closest(runs: Sequence[Run]) -> str:
    """On the run with the least KL, or the plainest of those as good."""
    best, *ties = _best(runs)
    halves = abs(best["ratio"] / 2 - 1) <= 1 - HALF / 2
    smaller = "halves the cache" if halves else f"makes the cache {best['ratio']:.2g} times smaller"
    return (
        f"{best['format']} {smaller} for a mean KL of {_kl(best)} nats a token, "
        f"and leaves the likeliest token as it was {percent(best['same_top'])} of the time{_tied_with(ties)}."
    )


def _smallest(runs: Sequence[Run]) -> str:
    """On the smallest run that is surely nearly exact, and what comes below it."""
    front = pareto_front(runs)
    good = [run for run in runs if run["kl_mean"] + SURE * (run["kl_mean_se"] or 0.0) <= NEARLY_EXACT]
    if not good:
        closest = front[-1]
        return f"None is surely under {NEARLY_EXACT:g}: the closest, {closest['format']}, has {_kl(closest)}."
    size = min(run["bytes_per_token"] for run in good)
    best, *ties = _best([run for run in good if run["bytes_per_token"] == size])
    below = [run for run in front if run["bytes_per_token"] < size][:-3:-1]
    return (
        f"{best['format']} is the smallest that is surely under {NEARLY_EXACT:g} "
        f"({best['bits_per_element']:.3g} bits, KL {_kl(best)}{_tied_with(ties, ', ')})"
        + (f"; below that, {' and '.join(map(_cost, below))}." if below else ".")
    )


def _best(runs: Sequence[Run]) -> list[Run]:
    """The run to name, and those that tie with the least KL.

    The smallest and then plainest within one standard error of the least (Breiman et al., Classification and
    Regression Trees, 1984, section 3.4.3: the 1 SE rule).
    """
    least = min(runs, key=lambda run: run["kl_mean"])
    plainest = sorted(runs, key=lambda run: (run["bytes_per_token"], len(run["format"]), run["kl_mean"]))
    best = next(run for run in plainest if tied(run, least, errors=1))
    return [best, *(run for run in plainest if run is not best and tied(run, least))]


def _cost(run: Run) -> str:
    return f"{run['format']} ({run['bits_per_element']:.3g} bits) costs {_kl(run)}"


def _kl(run: Run) -> str:
    return small(run["kl_mean"], run["kl_mean_se"])


def _tied_with(ties: Sequence[Run], comma: str = "; ") -> str:
    return f"{comma}tied with {_names([run['format'] for run in ties])}" if ties else ""


def _names(names: Sequence[str]) -> str:
    """'a, b and c'; 'a, b, c and 4 more'."""
    shown, rest = list(names[:NAMES]), len(names) - NAMES
    if rest > 0:
        shown.append(f"{rest} more")
    return " and ".join(filter(None, [", ".join(shown[:-1]), shown[-1]]))
