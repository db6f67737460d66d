"""Shows on stderr how far a sweep is."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING

from qpaged.sweep._extras import need
from qpaged.sweep._numbers import rough_duration
from qpaged.sweep.measure import Progress

if TYPE_CHECKING:
    from rich.console import Console


@contextmanager
def progress_bar(total: int, command: str) -> Iterator[Progress]:
    """Show a bar over ``total`` tokens, with the format that is measured and the time left.

    Where stderr is no terminal, print a line for each format instead, after the command's name.
    """
    console = need("rich.console").Console(stderr=True)
    if console.is_terminal:
        with _bar(total, console) as progress:
            yield progress
    else:
        yield _Lines(total, command)


class _Clock:
    """Counts the tokens that are done, and estimates the time left by the mean speed so far.

    The mean is taken from the beginning, because each format begins with a pause for its compilation.
    """

    def __init__(self, total: int):
        self._total = total
        self._done = 0
        self._start = time.monotonic()

    def advance(self, tokens: int) -> None:
        self._done += tokens

    def seconds_left(self) -> float:
        elapsed = time.monotonic() - self._start
        left = max(self._total / self._done - 1, 0)  # A search may take more rounds than were counted.
        return elapsed * left

    def has_begun(self) -> bool:
        return self._done > 0


@contextmanager
def _bar(total: int, console: "Console") -> Iterator[Progress]:
    progress = need("rich.progress")
    columns = (
        progress.TextColumn("{task.description}", markup=False),
        progress.BarColumn(),
        progress.TaskProgressColumn(),
        progress.TimeElapsedColumn(),
        progress.TextColumn("{task.fields[left]}"),
    )
    clock = _Clock(total)
    with progress.Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("starting", total=total, left="")

        def advance(spelling: str, tokens: int) -> None:
            clock.advance(tokens)
            left = timedelta(seconds=round(clock.seconds_left()))
            bar.update(task, advance=tokens, description=spelling, left=f"{left} left")

        yield advance


class _Lines:
    """Prints a line when a format begins, with the time left once that can be estimated."""

    def __init__(self, total: int, command: str):
        self._clock = _Clock(total)
        self._command = command
        self._spelling: str | None = None

    def __call__(self, spelling: str, tokens: int) -> None:
        if spelling != self._spelling:
            self._spelling = spelling
            left = ""
            if self._clock.has_begun():
                left = f" (about {rough_duration(self._clock.seconds_left())} left)"
            print(f"qpaged {self._command}: {spelling}{left}", file=sys.stderr, flush=True)
        self._clock.advance(tokens)
