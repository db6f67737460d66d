"""Files of results: written as a whole, kept when another sweep replaces them, and resumed from."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qpaged._files import has_own_digest, write_whole
from qpaged.sweep._extras import need
from qpaged.sweep.measure import Run, Sweep
from qpaged.sweep.results._record import (
    VERSION,
    SweepResult,
    conditions,
    run_from_record,
    same_conditions,
)

RESULTS = "results.json"
LOCK = ".results.lock"


def known_runs(sweep: Sweep, directory: Path) -> tuple[Run, ...]:
    """Return the runs that an earlier sweep left in ``directory`` under the same conditions.

    There are none if the file is of another version, model, text, tokenizer, settings or environment, or is
    damaged: a sweep may always start anew.
    """
    try:
        record = json.loads((directory / RESULTS).read_text(encoding="utf-8"))
        if not has_own_digest(record) or record["version"] != VERSION:
            return ()
        if same_conditions(record) != same_conditions(conditions(sweep)):
            return ()
        return tuple(run_from_record(run) for run in record["runs"])
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return ()  # The file is missing, is no JSON, or has another structure.


@contextmanager
def claimed(directory: Path) -> Iterator[None]:
    """Keep a directory for one sweep while the context is open.

    Raises:
        ValueError: another sweep has it.
    """
    filelock = need("filelock")
    lock = filelock.FileLock(directory / LOCK, timeout=0)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise ValueError(
            f"results must go to a directory of their own for each sweep or search that runs, but another "
            f"one writes to {directory.resolve()}; wait for it, or choose another directory."
        ) from None
    try:
        yield
    finally:
        lock.release()
        (directory / LOCK).unlink(missing_ok=True)


def set_aside(directory: Path) -> Path | None:
    """Rename the results in ``directory``, so that another sweep does not overwrite them."""
    path = directory / RESULTS
    if not path.exists():
        return None
    return path.replace(directory / "results.old.json")


def write_json(result: SweepResult, directory: Path) -> Path:
    """Write ``results.json``; an interrupt leaves the previous file."""
    path = directory / RESULTS
    write_whole(path, result.to_json())
    return path
