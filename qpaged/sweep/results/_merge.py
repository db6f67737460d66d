"""Results of one model and text that were measured apart, as on several machines, put together."""

import json
from collections.abc import Sequence
from pathlib import Path

from qpaged._files import has_own_digest
from qpaged.sweep.results._files import RESULTS
from qpaged.sweep.results._reading import Results, check
from qpaged.sweep.results._record import run_from_record, same_conditions

CONDITIONS = (
    "the model, the text or the tokenizer",
    "the prefix",
    "the reference",
    "settings",
    "the environment",
    "tasks",
)
"""What :func:`same_conditions` lists, in words."""


def read_results(path: str | Path) -> Results:
    """Return what a sweep wrote.

    Args:
        path: the directory of a sweep, or its ``results.json``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it was changed, or is of another version.
    """
    file = Path(path) / RESULTS if Path(path).is_dir() else Path(path)
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        if not has_own_digest(record):
            raise ValueError("its digest does not match")
        check(record, ())
        for run in record["runs"]:
            run_from_record(run)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{file} must be what qpaged sweep wrote, but cannot be read: {error}; sweep again."
        ) from error
    return dict(record)


def merged(results: Sequence[Results]) -> Results:
    """Return results with the runs of all, each format once, the reference first.

    Of a format that was measured twice the first run counts, and a failure counts where there is no run.

    Raises:
        ValueError: there are none, or they were measured under different conditions.
    """
    if not results:
        raise ValueError("results must be those of one sweep at least, but are none; give their directories.")
    first, *others = results
    for number, other in enumerate(others, 2):
        parts = zip(CONDITIONS, same_conditions(first), same_conditions(other), strict=True)
        different = [name for name, own, of_other in parts if own != of_other]
        if different:
            raise ValueError(
                f"results must be of one model, text, settings and environment, but number {number} differs "
                f"from the first in {' and '.join(different)}; sweep both alike."
            )
    runs = {run["identity"]: run for record in reversed(results) for run in reversed(record["runs"])}
    reference = first["runs"][0]["identity"]
    in_order = [run["identity"] for record in results for run in record["runs"]]
    order = dict.fromkeys([reference, *in_order])
    measured = {run["format"] for run in runs.values()}
    failures = {
        failure["format"]: failure
        for record in reversed(results)
        for failure in record["failures"]
        if failure["format"] not in measured
    }
    dates = [record["environment"]["date"] for record in results]
    return {
        **first,
        "complete": all(record["complete"] for record in results),
        "environment": {**first["environment"], "date": max(dates)},
        "runs": [runs[identity] for identity in order],
        "failures": list(failures.values()),
    }
