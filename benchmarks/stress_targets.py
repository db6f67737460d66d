"""What the formats are held to, as data, and which format does best at each."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Target:
    """A loss of the keys in one case that some format must not exceed.

    Attributes:
        limit: the largest loss that meets the target; None where the best is only reported.
        max_bits: bits an element of the keys, scales included, that the format may take.
        format: the format meant; any if None.
    """

    case: str
    metric: str
    limit: float | None = None
    max_bits: float | None = None
    format: str | None = None

    def admits(self, run: dict[str, Any]) -> bool:
        small = self.max_bits is None or run["key_bits"] <= self.max_bits
        return small and self.format in (None, run["format"]) and self.loss(run) is not None

    def loss(self, run: dict[str, Any]) -> float | None:
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


def judge(target: Target, runs: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The target with the ``best`` run for it, and whether that ``met`` it; None where no run is admitted.

    Without a limit ``met`` is None.
    """
    admitted = [run for run in runs if target.admits(run)]
    best = min(admitted, key=target.loss, default=None)
    found = None
    if best is not None:
        found = {name: best[name] for name in ("format", "page_size", "key_bits")}
        found["loss"] = target.loss(best)
    met = None if target.limit is None else found is not None and found["loss"] <= target.limit
    return asdict(target) | {"best": found, "met": met}


def describe(verdict: dict[str, Any]) -> str:
    """A verdict of :func:`judge` in a line."""
    who = verdict["format"] or f"best at <= {verdict['max_bits']} bits"
    limit = "" if verdict["limit"] is None else f" <= {verdict['limit']:g}"
    best = verdict["best"]
    found = "no such format" if best is None else (
        f"{best['loss']:.3g} ({best['format']}, pages of {best['page_size']}, {best['key_bits']:.3f} bits)"
    )  # fmt: skip
    word = {True: "met", False: "MISSED", None: "-"}[verdict["met"]]
    return f"{word:6}  {verdict['case']} {verdict['metric']}{limit}, {who}: {found}"
