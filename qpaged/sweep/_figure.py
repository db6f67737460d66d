"""The figure of a sweep: divergence against bytes, with the Pareto front."""

from pathlib import Path

from qpaged.sweep._extras import need
from qpaged.sweep._result import SweepResult, pareto_front
from qpaged.sweep._table import title


def write_figure(result: SweepResult, directory: Path) -> Path:
    """Write ``frontier.png``."""
    figure = need("matplotlib.figure").Figure(figsize=(9, 6), layout="constrained")
    axes = figure.subplots()
    for run in result.runs:
        axes.plot(run.bytes_per_token, max(run.accuracy.kl_mean, 1e-12), "o")
        axes.annotate(run.format, (run.bytes_per_token, max(run.accuracy.kl_mean, 1e-12)))
    front = pareto_front(result.runs)
    axes.step([r.bytes_per_token for r in front], [max(r.accuracy.kl_mean, 1e-12) for r in front], where="post")
    axes.set_yscale("log")
    axes.set_title(title(result))
    path = directory / "frontier.png"
    figure.savefig(path, dpi=150)
    return path
