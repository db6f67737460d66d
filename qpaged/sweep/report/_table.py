"""The table of a sweep, for a terminal or a pipe."""

import os
from typing import TYPE_CHECKING

from qpaged.sweep._extras import need
from qpaged.sweep._numbers import PLUS_MINUS, percent, small, whole_percent
from qpaged.sweep.measure import METRICS, WIDE, Metric, TaskScore
from qpaged.sweep.report._verdict import verdict
from qpaged.sweep.results import BROKEN, Results, RunRecord, is_broken, pareto_front, title

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

ROOMY = 90  # width from which on two spaces stand between columns
PIPE_WIDTH = 132  # width where there is no terminal

TASK_COLUMNS = "acc", "acc_norm", "same"

LEGEND = (
    "KL in nats a token, to {plain} ({reference}). ratio: bfloat16 bytes over these. attn error: worst "
    "layer, relative. greedy: tokens until a continuation differs, of {generated}. "
    "* Pareto front: none is both smaller and closer."
)
BROKEN_LEGEND = f" broken: a KL above {BROKEN:g}, where the model no longer says what it did."
COUNTED_LEGEND = " Bytes are those of sequences of {tokens:,} tokens."
NOISE_LEGEND = " Noise, the reference against itself: {noises}."
ERRORS_LEGEND = f" {PLUS_MINUS} standard errors over sequences."


def print_table(results: Results, console: "Console | None" = None) -> None:
    """Print one row per format, in the order of the results, and the verdict below them."""
    if console is None:
        console = _stdout_console()
    console.print(_table(results, console.width), highlight=False)
    for number in range(len(results.get("tasks", []))):
        console.print(_task_table(results, number), highlight=False)
    if any(run.get("needles") for run in results["runs"]):
        console.print(_needle_table(results), highlight=False)
    console.print(f"{verdict(results)}\n", highlight=False, markup=False)


def _table(results: Results, width: int) -> "Table":
    escape = need("rich.markup").escape  # Names may hold brackets, which are markup to rich.
    runs = results["runs"]
    is_wide = width >= WIDE
    caption = LEGEND.format(
        plain=escape(runs[0]["format"]),
        reference=results["reference"],
        generated=results["settings"]["generated"],
    )
    if results["settings"].get("bits_at"):  # which earlier versions did not know
        caption += COUNTED_LEGEND.format(tokens=results["settings"]["bits_at"])
    if any(map(is_broken, runs)):
        caption += BROKEN_LEGEND
    noises = [
        f"{small(noise['kl_mean'], noise['kl_mean_se'])} ({noise['conditions']})"
        for noise in runs[0].get("noise") or ()
    ]
    if noises:
        caption += NOISE_LEGEND.format(noises=" and ".join(noises))
    if is_wide:
        caption += ERRORS_LEGEND
    table = need("rich.table").Table(
        title=escape(title(results)),
        caption=caption,
        box=need("rich.box").SIMPLE_HEAD,
        padding=(0, 1 if width >= ROOMY else 0, 0, 0),
        caption_justify="left",
        title_justify="left",
    )
    metrics = shown_metrics(width)
    table.add_column("format", overflow="fold", vertical="bottom")
    for metric in metrics:
        assert metric.table is not None
        table.add_column(metric.table.heading, justify="right", no_wrap=True)
    front = pareto_front(runs)
    for run in runs:
        on_front = run in front
        name = escape(run["format"]) + (" *" if on_front else "")
        if is_broken(run):
            name += " (broken)"
        cells = [cell_text(metric, run, with_error=is_wide) for metric in metrics]
        table.add_row(name, *cells, style="bold" if on_front else None)
    return table


def _task_table(results: Results, number: int) -> "Table":
    """Return a row for each format that answered a task."""
    escape = need("rich.markup").escape
    task = results["tasks"][number]
    table = need("rich.table").Table(
        title=escape(f"{task['name']}: {task['questions']:,} questions"),
        caption="acc: the likeliest choice is right; acc_norm: the likeliest by character. same: as from the "
        f"reference. {PLUS_MINUS} standard errors over questions.",
        box=need("rich.box").SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        caption_justify="left",
        title_justify="left",
    )
    table.add_column("format", overflow="fold")
    for name in TASK_COLUMNS:
        table.add_column(name, justify="right", no_wrap=True)
    for run in results["runs"]:
        if run.get("tasks"):  # else it was measured by an earlier version
            table.add_row(escape(run["format"]), *task_cells(run["tasks"][number]))
    return table


def _needle_table(results: Results) -> "Table":
    """Return a row for each format that was asked for hidden numbers."""
    escape = need("rich.markup").escape
    asked = [run for run in results["runs"] if run.get("needles")]  # others are of an earlier version
    table = need("rich.table").Table(
        title="found of the numbers hidden in so many tokens",
        min_width=48,  # of the title, which is longer than the columns
        caption=f"{PLUS_MINUS} standard errors over texts. The report shows them by depth.",
        box=need("rich.box").SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        caption_justify="left",
        title_justify="left",
    )
    table.add_column("format", overflow="fold")
    for score in asked[0]["needles"]:
        table.add_column(f"{score['length']:,}", justify="right", no_wrap=True)
    for run in asked:
        cells = [whole_percent(score["found"], score["found_se"]) for score in run["needles"]]
        table.add_row(escape(run["format"]), *cells)
    return table


def task_cells(score: TaskScore) -> list[str]:
    """Return :data:`TASK_COLUMNS` of a format."""
    return [
        percent(score["acc"], score["acc_se"]),
        percent(score["acc_norm"], score["acc_norm_se"]),
        percent(score["same"], score["same_se"]),
    ]


def shown_metrics(width: int) -> list[Metric]:
    """Return the metrics that a terminal of so many columns has room for."""
    shown = []
    for metric in METRICS:
        column = metric.table
        if column is not None and column.min_width is not None and column.min_width <= width:
            shown.append(metric)
    return shown


def cell_text(metric: Metric, run: RunRecord, with_error: bool) -> str:
    """Return a metric of a run as tables of text show it; empty if it was not measured."""
    assert metric.table is not None
    value = run.get(metric.key)
    if value is None:
        return ""
    error = None
    if with_error and metric.table.with_error:
        error = run[f"{metric.key}_se"] or None  # the reference is exact: 0 instead of 0 ± 0
    return metric.table.number(value, error)


def _stdout_console() -> "Console":
    """Return standard output, as wide as the terminal, or wide enough if it is none."""
    console = need("rich.console").Console()
    if not console.is_terminal and not os.environ.get("COLUMNS"):
        console.width = PIPE_WIDTH
    return console
