"""Files of results: written as a whole, kept when another sweep replaces them, and resumed from."""

import json
import os
from pathlib import Path

from qpaged.sweep.measure import Run, Sweep
from qpaged.sweep.results._record import (
    VERSION,
    SweepResult,
    conditions,
    run_from_record,
    same_conditions,
)

RESULTS = "results.json"


def known_runs(sweep: Sweep, directory: Path) -> tuple[Run, ...]:
    """Return the runs that an earlier sweep left in ``directory`` under the same conditions.

    There are none if the file is of another version, model, text, tokenizer, settings or environment, or
    cannot be read: a sweep may always start anew.
    """
    try:
        record = json.loads((directory / RESULTS).read_text(encoding="utf-8"))
        if record["version"] != VERSION:
            return ()
        if same_conditions(record) != same_conditions(conditions(sweep)):
            return ()
        return tuple(run_from_record(run) for run in record["runs"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return ()  # The file is missing, is no JSON, or has another structure.


def set_aside(directory: Path) -> Path | None:
    """Rename the results in ``directory``, so that another sweep does not overwrite them."""
    path = directory / RESULTS
    if not path.exists():
        return None
    return path.replace(directory / "results.old.json")


def write_json(result: SweepResult, directory: Path) -> Path:
    """Write ``results.json``; an interrupt leaves the previous file."""
    path = directory / RESULTS
    # The process's number keeps two sweeps in one directory from writing the same partial file.
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_text(result.to_json(), encoding="utf-8")
    partial.replace(path)
    return path
