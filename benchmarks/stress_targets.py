"""The targets that formats should meet, as data, and the judgement of measured runs."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

Run = dict[str, Any]
"""A measurement of ``stress.py``, as JSON."""


@dataclass(frozen=True)
class Target:
    """A loss in one case that some format must not exceed.

    Attributes:
        case: one of ``stress_cases.CASES``.
        metric: one of the fields of ``stress_metrics.Losses``.
        limit: the largest loss that meets the target; if None, the best run is only reported.
        max_bits: the most bits per element that the format's keys may take, scales included.
        format: the only format that may meet it; any may if None.
    """

    case: str
    metric: str
    limit: float | None = None
    max_bits: float | None = None
    format: str | None = None

    def admits(self, run: Run) -> bool:
        """Return True if the run is of the format meant, small enough, and its loss finite."""
        is_small = self.max_bits is None or run["key_bits"] <= self.max_bits
        is_meant = self.format is None or self.format == run["format"]
        return is_small and is_meant and self.loss(run) is not None

    def loss(self, run: Run) -> float | None:
        """Return the run's loss; None if it is not finite."""
        return run["losses"][self.case][self.metric]


TARGETS = (
    Target("gaussian", "key_rms", 0.0125, format="int8"),
    Target("gaussian", "key_rms", 0.007, format="int8:token"),
    Target("gaussian", "key_rms", 0.09, max_bits=4.6),
    Target("bias_slow", "attention_kl", 1e-3, max_bits=9),
    Target("bias_slow", "attention_kl", 0.05, max_bits=6),
    Target("bias_fast", "attention_kl", max_bits=9),
    Target("bias_fast", "attention_kl", max_bits=6),
    Target("bias_fast", "attention_kl", max_bits=4.6),
)


def judge(target: Target, runs: Iterable[Run]) -> dict[str, Any]:
    """Return the target as JSON, with the ``best`` admitted run and whether it ``met`` the limit.

    ``best`` is None if no run is admitted, and ``met`` is None without a limit.
    """
    admitted = [run for run in runs if target.admits(run)]
    best = min(admitted, key=target.loss, default=None)
    best_json = None
    if best is not None:
        best_json = {name: best[name] for name in ("format", "page_size", "key_bits")}
        best_json["loss"] = target.loss(best)
    met = None
    if target.limit is not None:
        met = best_json is not None and best_json["loss"] <= target.limit
    return asdict(target) | {"best": best_json, "met": met}


def describe(verdict: dict[str, Any]) -> str:
    """Return a verdict of :func:`judge` as a line."""
    meant = verdict["format"] or f"best at <= {verdict['max_bits']} bits"
    limit = "" if verdict["limit"] is None else f" <= {verdict['limit']:g}"
    best = verdict["best"]
    result = "no such format"
    if best is not None:
        where = f"{best['format']}, pages of {best['page_size']}, {best['key_bits']:.3f} bits"
        result = f"{best['loss']:.3g} ({where})"
    word = {True: "met", False: "MISSED", None: "-"}[verdict["met"]]
    return f"{word:6}  {verdict['case']} {verdict['metric']}{limit}, {meant}: {result}"
