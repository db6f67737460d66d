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
    Record,
    SweepResult,
    conditions,
    json_of,
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
def claimed(path: Path, option: str = "--out") -> Iterator[None]:
    """Keep a directory, or a file and its journal, for one sweep or search while the context is open.

    The lock, a hidden file in the directory or beside the file, stays: another process may have opened it
    already, and would then hold one that nobody else sees.

    Args:
        option: what names the path on the command line.

    Raises:
        ValueError: another sweep or search has it.
    """
    filelock = need("filelock")
    lock = filelock.FileLock(path / LOCK if path.is_dir() else path.with_name(f".{path.name}.lock"))
    try:
        held = lock.acquire(timeout=0)
    except filelock.Timeout:
        raise ValueError(
            f"{option} must be for one sweep or search at a time, but another one writes to "
            f"{path.resolve()}; wait for it, or give another path."
        ) from None
    with held:
        yield


def set_aside(directory: Path) -> Path | None:
    """Rename the results in ``directory``, so that another sweep does not overwrite them."""
    path = directory / RESULTS
    if not path.exists():
        return None
    return path.replace(directory / "results.old.json")


def write_json(result: SweepResult, directory: Path) -> Path:
    """Write ``results.json``; an interrupt leaves the previous file."""
    return write_record(result.to_dict(), directory)


def write_record(record: Record, directory: Path) -> Path:
    """Write a record as ``results.json``, likewise."""
    path = directory / RESULTS
    write_whole(path, json_of(record))
    return path
