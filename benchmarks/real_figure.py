"""Draws the results of ``real_models.py``: KL against bits a value, with the Pareto front of each model.

    python benchmarks/real_figure.py

Dots are formats, and squares those of llama.cpp. A format with exact pages takes fewer bits the longer a
sequence is: its dot stands at 8k tokens, with a line from 1k to 32k. A cross is a format that destroys the
model.
"""

import argparse
import math
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from real_results import RESULTS, Record, Results, read
from stress_figure import Dot, front_of, label

from qpaged.sweep.report.palette import ACCENT, LIGHT, MUTED
from qpaged.sweep.results import is_broken

PICTURE = Path(__file__).parents[1] / "docs" / "assets" / "real_models.png"
PEER = LIGHT["c1"]
PAGE_SIZES = 16, 32  # tokens; those other than the first are said with a format's name
AT = "8192"  # tokens at which a cache's bits are counted
MOST_BITS = 10  # where the axis ends; bfloat16 is a line across it
LABEL_BITS = 1.8  # room for the names left of the front
LABEL_HEIGHT = 11  # points (1/72 inch) from one label to the next


def shown_runs(results: Results, model: str, context: int) -> list[Record]:
    """Return the runs of a model at one context, over all positions."""
    condition = model, context, 0
    runs = [run for run in results["runs"] if (run["model"], run["context"], run["skip_first"]) == condition]
    return [run for run in runs if is_peer(run) or run["page_size"] in PAGE_SIZES]


def is_peer(run: Record) -> bool:
    """Return True for a run of another engine."""
    return run["engine"] != "qpaged"


def dots_of(runs: list[Record]) -> list[Dot]:
    """Return the dots that fit the axes."""
    return [
        Dot(name_of(run), run["bits"][AT], run["kl_mean"])
        for run in runs
        if run["kl_mean"] > 0 and run["bits"][AT] <= MOST_BITS
    ]


def name_of(run: Record) -> str:
    """Return the name of a dot: a format, with its page if that is another than most have, or a peer's."""
    if is_peer(run):
        return f"{run['engine'].split()[0]} {run['format']}"
    names = run["format"].replace("/", "\n/")  # keys and values in a line each
    return names if run["page_size"] == PAGE_SIZES[0] else f"{names}, {run['page_size']}"


def own_front(runs: list[Record]) -> list[Dot]:
    """Return the dots of the front, smallest first: of our formats, without those that destroy the model."""
    return front_of(dots_of([run for run in runs if not is_peer(run) and not is_broken(run)]))


def draw(results: Results, context: int) -> Figure:
    """Draw a panel for each model."""
    models = [model for model in results["models"] if shown_runs(results, model, context)]
    figure = Figure(figsize=(9, 5.5 * len(models)), layout="constrained")
    panels = figure.subplots(len(models), squeeze=False, sharex=True, sharey=True)[:, 0]
    shown = [shown_runs(results, model, context) for model in models]
    for axes, model, runs in zip(panels, models, shown, strict=True):
        draw_model(axes, runs)
        tokens = max(run["tokens"] for run in runs)
        axes.set_title(f"{model}: {tokens:,} tokens in sequences of {context:,}", fontsize=10, loc="left")
    scale(panels[-1], [run for runs in shown for run in runs])
    panels[-1].set_xlabel(
        "bits a value of a cache of 8k tokens, scales included; pages of 16 tokens, or as said"
    )
    figure.draw_without_rendering()  # so that labels can be placed in points
    for axes, runs in zip(panels, shown, strict=True):
        front = own_front(runs)
        label(axes, front)
        others = [dot for dot in dots_of(runs) if dot not in front and "\n" not in dot.name]
        label_others(axes, others)
    return figure


def draw_model(axes: Axes, runs: list[Record]) -> None:
    """Draw the dots of a model and of peers, the steps of the model's front, and a bfloat16 cache's KL."""
    dots = dots_of([run for run in runs if not is_peer(run) and not is_broken(run)])
    broken = dots_of([run for run in runs if is_broken(run)])
    peers = dots_of([run for run in runs if is_peer(run)])
    front = own_front(runs)
    for run in runs:
        if run["kl_mean"] > 0:
            spread = [min(bits, MOST_BITS) for bits in run["bits"].values()]
            axes.plot([min(spread), max(spread)], [run["kl_mean"]] * 2, color=MUTED, lw=0.8, zorder=1)
    axes.plot([dot.bits for dot in dots], [dot.kl for dot in dots], "o", color=MUTED, mfc="white", ms=5)
    axes.plot([dot.bits for dot in broken], [dot.kl for dot in broken], "x", color=MUTED, ms=6)
    axes.plot([dot.bits for dot in peers], [dot.kl for dot in peers], "s", color=PEER, mfc="white", ms=5)
    axes.step([dot.bits for dot in front], [dot.kl for dot in front], where="post", color=ACCENT, lw=1.5)
    axes.plot([dot.bits for dot in front], [dot.kl for dot in front], "o", color=ACCENT, ms=6)
    for run in runs:
        if run["format"] == "raw":
            axes.axhline(run["kl_mean"], color=MUTED, lw=0.8, ls=":")
            axes.text(MOST_BITS, run["kl_mean"], "bfloat16", va="bottom", ha="right", fontsize=8, color=MUTED)
    axes.set_ylabel("mean KL to the float32 cache (nats a token)")
    axes.set_yscale("log")
    axes.minorticks_off()
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def scale(axes: Axes, runs: list[Record]) -> None:
    """Choose the limits that all panels share, with room for names left of the dots."""
    dots = dots_of(runs)
    lines = [run["kl_mean"] for run in runs if run["format"] == "raw"]
    bottom = math.floor(math.log10(min([dot.kl for dot in dots] + lines)))
    fewest = min(dot.bits for dot in dots)
    axes.set(ylim=(10.0**bottom, 3 * max(dot.kl for dot in dots)))
    axes.set(xlim=(fewest - LABEL_BITS, MOST_BITS), xticks=range(int(fewest), MOST_BITS + 1))


def label_others(axes: Axes, dots: list[Dot]) -> None:
    """Write the names of dots off the front right of and above them, each above the one before."""
    points_per_pixel = 72 / axes.figure.dpi
    height = -math.inf
    line = {"arrowstyle": "-", "lw": 0.6, "color": MUTED, "shrinkA": 0, "shrinkB": 3, "relpos": (0, 0.5)}
    for dot in sorted(dots, key=lambda dot: dot.kl):
        y = axes.transData.transform((dot.bits, dot.kl))[1] * points_per_pixel
        height = max(y + LABEL_HEIGHT / 2, height + LABEL_HEIGHT)
        axes.annotate(
            dot.name, (dot.bits, dot.kl), (10, height - y), textcoords="offset points", fontsize=8,
            color=PEER if " " in dot.name else MUTED, ha="left", va="center", arrowprops=line,
        )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--out", type=Path, default=PICTURE)
    arguments = parser.parse_args()
    draw(read(arguments.results), arguments.context).savefig(arguments.out, dpi=150)


if __name__ == "__main__":
    main()
