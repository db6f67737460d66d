"""How far a sweep is, on stderr."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from qpaged.sweep._extras import need
from qpaged.sweep._run import Report


@contextmanager
def progress_bar(total: int) -> Iterator[Report]:
    """A bar over ``total`` tokens with the format in work and the time left.

    Off a terminal it is a line for each format.
    """
    console = need("rich.console").Console(stderr=True)
    if not console.is_terminal:
        yield _lines()
        return
    progress = need("rich.progress")
    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.TaskProgressColumn(),
        progress.TimeElapsedColumn(),
        progress.TextColumn("left"),
        progress.TimeRemainingColumn(),
    )
    # A long window for the speed: every format begins with a pause for its compilation.
    with progress.Progress(*columns, console=console, transient=True, speed_estimate_period=600) as bar:
        task = bar.add_task("compiling", total=total)
        yield lambda format, tokens: bar.update(task, advance=tokens, description=format)


def _lines() -> Report:
    last: list[str] = []

    def report(format: str, tokens: int) -> None:
        if last != [format]:
            last[:] = [format]
            print(f"qpaged sweep: {format}", file=sys.stderr, flush=True)

    return report
