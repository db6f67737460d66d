"""The table of a sweep, for a terminal or a pipe."""

import os
from typing import Any

from qpaged.sweep._extras import need
from qpaged.sweep._result import SweepResult, pareto_front
from qpaged.sweep._run import Run

ROOMY = 90  # columns that have room for two spaces between columns
WIDE = 118  # columns that have room for all that the table has to say
PIPE_WIDTH = 132  # columns where nothing says how many there are

COLUMNS = {
    "format": "format",
    "bytes": "bytes/\ntoken",
    "ratio": "ratio",
    "perplexity": "perplexity\nratio - 1",
    "kl": "KL\nmean",
    "tail": "KL\n99.9 %",
    "same": "same\ntop-1",
    "attention": "attn\nerror",
    "greedy": "greedy\ntokens",
    "change": "RMS\n\N{GREEK CAPITAL LETTER DELTA}p",
    "step": "ms/\nstep",
}
NARROW = tuple(COLUMNS)[:9]

LEGEND = (
    "KL in nats a token, to {plain} ({reference}). ratio: bfloat16 bytes over these. attn error: worst layer, "
    "relative. greedy: tokens until a continuation differs, of {generated}. \N{PLUS-MINUS SIGN} standard errors over "
    "sequences. * Pareto front: none is both smaller and closer."
)


def print_table(result: SweepResult, console: Any = None) -> None:
    """One row per format, in the order they were asked for."""
    console = console or stdout_console()
    shown = tuple(COLUMNS) if console.width >= WIDE else NARROW
    plain = result.runs[0].format if result.runs else "plain"
    table = need("rich.table").Table(
        title=title(result),
        caption=LEGEND.format(
            plain=plain,
            reference=result.sweep.model.reference,
            generated=result.sweep.settings.continued,
        ),
        box=need("rich.box").SIMPLE_HEAD,
        padding=(0, 1 if console.width >= ROOMY else 0, 0, 0),
        caption_justify="left",
        title_justify="left",
    )
    for name in shown:
        first = name == "format"
        table.add_column(
            COLUMNS[name], justify="left" if first else "right", no_wrap=not first, overflow="fold", vertical="bottom"
        )
    front = pareto_front(result.runs)
    for run in result.runs:
        cells = _cells(run, run in front, console.width >= WIDE)
        table.add_row(*(cells[name] for name in shown), style="bold" if run in front else None)
    console.print(table, highlight=False)


def title(result: SweepResult) -> str:
    """What was measured on what."""
    model, settings = result.sweep.model, result.sweep.settings
    sequences = len(result.sweep.sequences.tokens)
    unit = "bytes" if model.tokenizer.name == "bytes" else "tokens"
    return (
        f"{model.name} ({millions(model.parameters)} parameters) on {result.sweep.text.source}: "
        f"{sequences * settings.context:,} {unit} in {sequences} sequences"
    )


def millions(count: int) -> str:
    """2_400_000 as '2.4 M'."""
    return f"{count / 1e6:,.1f} M" if count >= 1e5 else f"{count:,}"


def stdout_console() -> Any:
    """Where tables are printed: as wide as the terminal, or wide enough where there is none."""
    console = need("rich.console").Console()
    if not console.is_terminal and not os.environ.get("COLUMNS"):
        console.width = PIPE_WIDTH
    return console


def _cells(run: Run, on_front: bool, bars: bool) -> dict[str, str]:
    accuracy, worst, step = run.accuracy, run.worst_attention_error, run.decode_seconds_per_step
    exact = accuracy.kl_max == 0
    return {
        "format": need("rich.markup").escape(run.format) + (" *" if on_front else ""),
        "bytes": f"{run.bytes_per_token:,.0f}",
        "ratio": f"{run.ratio:.2f}",
        "perplexity": "0"
        if exact
        else _with_error(accuracy.perplexity_ratio - 1, accuracy.perplexity_ratio_se, bars, "+"),
        "kl": "0" if exact else _with_error(accuracy.kl_mean, accuracy.kl_mean_se, bars),
        "tail": "0" if exact else f"{accuracy.kl_p999:.1e}",
        "same": f"{accuracy.same_top:.2%}",
        "attention": "" if worst is None else f"{worst:.1%}",
        "greedy": f"{run.greedy.first_difference:.1f}",
        "change": "0" if exact else f"{accuracy.probability_change_rms:.1e}",
        "step": "" if step is None else f"{1e3 * step:.1f}",
    }


def _with_error(value: float, error: float | None, shown: bool, sign: str = "") -> str:
    """``1.2e-04 ±3e-06``."""
    text = f"{value:{sign}.1e}"
    return f"{text} \N{PLUS-MINUS SIGN}{error:.0e}" if shown and error is not None else text
