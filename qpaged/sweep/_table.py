"""The table of a sweep, for a terminal or a pipe."""

import os
from typing import Any

from qpaged.sweep._extras import need
from qpaged.sweep._number import millions
from qpaged.sweep._result import SweepResult, pareto_front
from qpaged.sweep._run import Run

ROOMY = 90  # columns that have room for two spaces between columns
PIPE_WIDTH = 120  # columns where nothing says how many there are

COLUMNS = (
    "format",
    "bytes/\ntoken",
    "ratio",
    "bits/\nbyte",
    "KL\nmean",
    "KL\nmedian",
    "KL\n99.9 %",
    "same\ntop-1",
    "attn\nerror",
)

LEGEND = (
    "KL in nats a token, to {reference}, a plain float32 cache. ratio: bfloat16 bytes over these. "
    "attn error: worst layer, relative. * Pareto front: none is both smaller and closer."
)


def print_table(result: SweepResult, console: Any = None) -> None:
    """One row per format, in the order they were asked for."""
    console = console or _console()
    table = need("rich.table").Table(
        title=title(result),
        caption=LEGEND.format(reference=result.runs[0].format if result.runs else "plain"),
        box=need("rich.box").SIMPLE_HEAD,
        padding=(0, 1 if console.width >= ROOMY else 0, 0, 0),
        caption_justify="left",
        title_justify="left",
    )
    table.add_column(COLUMNS[0], overflow="fold", vertical="bottom")
    for name in COLUMNS[1:]:
        table.add_column(name, justify="right", no_wrap=True)
    front = pareto_front(result.runs)
    for run in result.runs:
        table.add_row(*_cells(run, run in front), style="bold" if run in front else None)
    console.print(table, highlight=False)


def title(result: SweepResult) -> str:
    """What was measured on what."""
    model, sequences, context = result.model, result.sequences, result.settings.context
    return (
        f"{model.name} ({millions(model.parameters)} parameters) on {result.text.source}: "
        f"{sequences * context:,} bytes in {sequences} sequences"
    )


def _cells(run: Run, on_front: bool) -> list[str]:
    accuracy = run.accuracy
    return [
        need("rich.markup").escape(run.format) + (" *" if on_front else ""),
        f"{run.bytes_per_token:,.0f}",
        f"{run.ratio:.2f}",
        f"{accuracy.bits_per_byte:.4f}",
        *(_small(kl) for kl in (accuracy.kl_mean, accuracy.kl_median, accuracy.kl_p999)),
        f"{accuracy.same_top:.2%}",
        f"{run.worst_attention_error:.1%}",
    ]


def _small(value: float) -> str:
    return "0" if value == 0 else f"{value:.1e}"


def _console() -> Any:
    console = need("rich.console").Console()
    if not console.is_terminal and not os.environ.get("COLUMNS"):
        console.width = PIPE_WIDTH
    return console
