"""How far a sweep is, on stderr."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

from qpaged.sweep._extras import need
from qpaged.sweep._run import Report


@contextmanager
def progress_bar(total: int, command: str) -> Iterator[Report]:
    """A bar over ``total`` tokens with the format in work and the time left.

    Off a terminal it is a line for each format, after the command's name.
    """
    console = need("rich.console").Console(stderr=True)
    if not console.is_terminal:
        yield _lines(command)
        return
    progress = need("rich.progress")
    columns = (
        progress.TextColumn("{task.description}", markup=False),
        progress.BarColumn(),
        progress.TaskProgressColumn(),
        progress.TimeElapsedColumn(),
        progress.TextColumn("{task.fields[left]}"),
    )
    with progress.Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("starting", total=total, left="")
        began = time.monotonic()

        def report(format: str, tokens: int) -> None:
            # By the mean speed so far: each format begins with a pause for its compilation.
            done = bar.tasks[0].completed + tokens
            rest = max(total / done - 1, 0)  # a search may take more rounds than were counted
            left = timedelta(seconds=round((time.monotonic() - began) * rest))
            bar.update(task, advance=tokens, description=format, left=f"{left} left")

        yield report


def _lines(command: str) -> Report:
    last: list[str] = []

    def report(format: str, tokens: int) -> None:
        if last != [format]:
            last[:] = [format]
            print(f"qpaged {command}: {format}", file=sys.stderr, flush=True)

    return report
