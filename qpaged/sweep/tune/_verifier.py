"""Measures formats end to end during a search, each once."""

import dataclasses
from functools import cached_property

from qpaged.formats import CacheFormat
from qpaged.sweep.measure import Bench, Progress, Run, Sequences, Sweep, identity
from qpaged.sweep.results import run_from_record, run_record
from qpaged.sweep.tune._journal import Journal


class Verifier:
    """Measures formats on some sequences of a sweep; formats in the journal are not measured again.

    Attributes:
        runs: the runs so far, by spelling, in the order of their verification.
        formats: their formats.
    """

    def __init__(self, sweep: Sweep, sequences: Sequences, journal: Journal, progress: Progress):
        self.runs: dict[str, Run] = {}
        self.formats: dict[str, CacheFormat] = {}
        self._sweep = sweep
        self._sequences = sequences
        self._journal = journal
        self._progress = progress

    def verify(self, spelling: str, cache_format: CacheFormat) -> Run:
        """Return the run of a format under this spelling."""
        self.formats[spelling] = cache_format
        key = f"run: {identity(cache_format)}"
        run = self._kept(key)
        if run is None:
            run = self._bench.measure(spelling, cache_format)
            self._journal.keep(key, run_record(run))
        run = dataclasses.replace(run, format=spelling)
        self.runs[spelling] = run
        return run

    def _kept(self, key: str) -> Run | None:
        """Return the run that the journal keeps under ``key``; None if it has none, or a damaged one."""
        try:
            return run_from_record(self._journal.get(key))
        except (LookupError, TypeError, ValueError, AttributeError):
            return None

    @cached_property
    def _bench(self) -> Bench:
        # Made on first use, since the plain cache's predictions are not needed if the journal has every run.
        plain = self._sweep.order[0][0]
        return Bench(self._sweep.model, self._sequences, self._sweep.settings, plain, self._progress)
