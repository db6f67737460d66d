"""Says in words what the results of a sweep show."""

from collections.abc import Sequence

from qpaged.sweep._numbers import percent, small, whole_percent
from qpaged.sweep.results import (
    CONFIDENT_ERRORS,
    MAX_KL,
    Results,
    RunRecord,
    check,
    is_within,
    noise_floor,
    pareto_front,
    tied,
)

HALVES = 1.75
"""Bytes of bfloat16 over a format's, from which on it about halves the cache: 8 bits, and one of scales."""
A_HALF = 0.05
"""How far from 2 that may be, as a share, for the verdict to say so."""

ENOUGH_FOUND = 0.9
"""The share of hidden numbers that the reference must find before formats are compared by what they find."""

MAX_NAMES = 3  # formats that a sentence names before it counts the others
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


def verdict(results: Results) -> str:
    """Return some sentences on what the formats cost; see :func:`sentences`."""
    return " ".join(sentences(results))


def sentences(results: Results) -> list[str]:
    """Return what the formats cost, sentence by sentence.

    Failures and interrupts come first; then the closest format that halves the cache; the smallest format
    below ``max_kl`` of the results, and what the next smaller ones cost; the noise of the reference, and what
    is within it; each task; hidden numbers; last the choice by layer, if any.

    Formats whose difference is within the error bars are called tied.

    Raises:
        ValueError: results of another version.
    """
    check(results, FIELDS)
    reference, *runs = results["runs"]
    smaller = [run for run in runs if run["ratio"] > 1]
    halving = [run for run in smaller if run["ratio"] >= HALVES]
    parts = [_incomplete(results)]
    if smaller:
        max_kl = results.get("max_kl", MAX_KL)
        parts += [_closest(halving or smaller), _smallest(smaller, max_kl), _within_noise(reference, smaller)]
    else:
        parts.append(f"No format smaller than bfloat16 was measured beside {reference['format']}.")
    parts += [
        _task(number, task["name"], results["runs"]) for number, task in enumerate(results.get("tasks", []))
    ]
    parts.append(_needles([run for run in results["runs"] if run.get("needles")]))
    tune = results.get("tune") or {}
    parts.append(tune.get("verdict", ""))
    return [sentence for sentence in parts if sentence]


def _incomplete(results: Results) -> str:
    """Return a sentence on formats that were not measured; empty if all were."""
    count = len(results["runs"])
    parts = []
    if not results["complete"]:
        formats = "format" if count == 1 else "formats"
        parts.append(f"the sweep stopped after {count} {formats}")
    if results["failures"]:
        failed = [failure["format"] for failure in results["failures"]]
        parts.append(f"{_listed(failed)} failed")
    if not parts:
        return ""
    return f"Incomplete: {', and '.join(parts)}."


def _closest(runs: Sequence[RunRecord]) -> str:
    """Return a sentence on the run with the least KL, or the plainest of those that are as good."""
    best, *ties = _best(runs)
    nearly_half = abs(best["ratio"] / 2 - 1) <= A_HALF
    smaller = "halves the cache" if nearly_half else f"makes the cache {best['ratio']:.2g} times smaller"
    return (
        f"{best['format']} {smaller} for a mean KL of {_kl(best)} nats a token, "
        f"and leaves the likeliest token as it was {percent(best['same_top'])} of the time"
        f"{_tied_with(ties, '; ')}."
    )


def _smallest(runs: Sequence[RunRecord], max_kl: float) -> str:
    """Return a sentence on the smallest run that is surely good enough, and on smaller ones."""
    front = pareto_front(runs)
    good = [run for run in runs if _upper_bound(run) <= max_kl]
    if not good:
        closest = min(runs, key=lambda run: run["kl_mean"])
        return (
            f"None is surely under {max_kl:g} nats of mean KL: the closest, {closest['format']}, has "
            f"{_kl(closest)}."
        )
    size = min(run["bytes_per_token"] for run in good)
    best, *ties = _best([run for run in good if run["bytes_per_token"] == size])
    sentence = (
        f"{best['format']} is the smallest that is surely under {max_kl:g} nats of mean KL "
        f"({best['bits_per_element']:.3g} bits, {_kl(best)}{_tied_with(ties, ', ')})"
    )
    smaller = [run for run in front if run["bytes_per_token"] < size]
    if smaller:
        next_smaller = smaller[:-3:-1]  # two, the larger first
        sentence += f"; below that, {' and '.join(_cost(run) for run in next_smaller)}"
    return f"{sentence}."


def _best(runs: Sequence[RunRecord]) -> list[RunRecord]:
    """Return the run to name, and those that tie with the least KL.

    The run to name is the smallest and then plainest within one standard error of the least (Breiman et al.,
    Classification and Regression Trees, 1984, section 3.4.3: the 1 SE rule).
    """
    least = min(runs, key=lambda run: run["kl_mean"])["kl_parts"]
    plainest = sorted(runs, key=lambda run: (run["bytes_per_token"], len(run["format"]), run["kl_mean"]))
    best = next(run for run in plainest if tied(run["kl_parts"], least, errors=1))
    ties = [run for run in plainest if run is not best and tied(run["kl_parts"], least)]
    return [best, *ties]


def _within_noise(reference: RunRecord, runs: Sequence[RunRecord]) -> str:
    """Return a sentence on the noise floor, and on the runs within it; empty if it was not measured."""
    noise = noise_floor(reference)
    if noise is None:
        return ""
    inside = [run for run in runs if is_within(run, noise)]
    within = _listed([run["format"] for run in inside]) if inside else "no format"
    verb = "are" if len(inside) > 1 else "is"
    kl = small(noise["kl_mean"], noise["kl_mean_se"])
    return f"The reference, {noise['conditions']}, is {kl} from itself: {within} {verb} within that noise."


def _task(number: int, name: str, runs: Sequence[RunRecord]) -> str:
    """Return a sentence on a task, and on the runs whose answers are worse beyond the error bars."""
    reference, *others = [(run["format"], run["tasks"][number]) for run in runs if run.get("tasks")]
    plain, of_plain = reference
    worse = [
        f"{format} ({percent(score['acc'])})"
        for format, score in others
        if score["acc"] < of_plain["acc"] and not tied(score["right"], of_plain["right"])
    ]
    right = percent(of_plain["acc"], of_plain["acc_se"])
    outcome = f"{_listed(worse)} less often beyond the error bars" if worse else "no format surely less often"
    return f"{plain} is right on {right} of {name}, {outcome}."


def _needles(runs: Sequence[RunRecord]) -> str:
    """Return a sentence on the numbers that are found in the longest texts; empty if none were hidden."""
    if not runs:
        return ""
    plain, *others = [(run["format"], max(run["needles"], key=lambda score: score["length"])) for run in runs]
    name, of_plain = plain
    share, length = whole_percent(of_plain["found"]), of_plain["length"]
    found = f"{name} finds {share} of the numbers hidden in {length:,} tokens"
    if of_plain["found"] < ENOUGH_FOUND:
        return f"{found}: too few to tell what formats lose; shorter texts may show it."
    fewer = [
        f"{format} ({whole_percent(score['found'])})"
        for format, score in others
        if score["found"] < of_plain["found"] and not tied(score["found_by_text"], of_plain["found_by_text"])
    ]
    return f"{found}; {_listed(fewer)} surely fewer." if fewer else f"{found}; no format surely fewer."


def _upper_bound(run: RunRecord) -> float:
    """Return the mean KL that a run surely does not exceed."""
    return run["kl_mean"] + CONFIDENT_ERRORS * (run["kl_mean_se"] or 0.0)


def _cost(run: RunRecord) -> str:
    return f"{run['format']} ({run['bits_per_element']:.3g} bits) costs {_kl(run)}"


def _kl(run: RunRecord) -> str:
    return small(run["kl_mean"], run["kl_mean_se"])


def _tied_with(ties: Sequence[RunRecord], separator: str) -> str:
    if not ties:
        return ""
    return f"{separator}tied with {_listed([run['format'] for run in ties])}"


def _listed(names: Sequence[str]) -> str:
    """Join names as 'a, b and c', or 'a, b, c and 4 more'."""
    shown = list(names[:MAX_NAMES])
    more = len(names) - MAX_NAMES
    if more > 0:
        shown.append(f"{more} more")
    if len(shown) == 1:
        return shown[0]
    return f"{', '.join(shown[:-1])} and {shown[-1]}"
