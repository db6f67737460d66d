"""The outcome of a search."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from qpaged.formats import CacheFormat
from qpaged.sweep._numbers import small
from qpaged.sweep.measure import Failure, Run, layer_spellings
from qpaged.sweep.tune._budget import Budget

SIDES = ("keys", "values")


@dataclass(frozen=True)
class Tuned:
    """A choice of formats by layer, verified end to end.

    Attributes:
        format: the choice.
        runs: the plain cache, the uniform formats (the same in all layers), and last the choice.
        failures: candidates that could not be measured.
        candidates: the other candidates, as the user typed them.
        sensitivity: [layers, 2, candidates], mean KL if only the keys, or only the values, of one layer are
            stored in a candidate; nats a token.
        predicted: the sum of the sensitivities of the choice; None where no sum promised to keep the budget,
            and the choice is the best uniform format.
        best_uniform: the best of the uniform runs that keep the budget; None if none does.
        better: True if the choice beats the best uniform run, by more than twice the standard error of the
            difference.
    """

    format: CacheFormat
    runs: tuple[Run, ...]
    failures: tuple[Failure, ...]
    candidates: tuple[str, ...]
    sensitivity: np.ndarray
    predicted: float | None
    best_uniform: Run | None
    better: bool
    budget: Budget

    @property
    def verdict(self) -> str:
        """A sentence that says whether to take the choice."""
        choice = _summary(self.runs[-1])
        if self.best_uniform is None:
            return f"By layer: {choice}. No format that is the same in all layers keeps {self.budget}."
        name, uniform = self.best_uniform.format, _summary(self.best_uniform)
        if self.better:
            return f"By layer: {choice}. The best that is the same in all layers, {name}: {uniform}."
        return f"{name} in all layers does as well: {uniform}; by layer: {choice}. Take the simpler one."

    @property
    def record(self) -> dict[str, Any]:
        """The search as ``results.json`` records it."""
        return {
            "bits": self.budget.bits,
            "max_kl": self.budget.max_kl,
            "choice": self.runs[-1].format,
            "predicted_kl": self.predicted,
            "best_uniform": self.best_uniform and self.best_uniform.format,
            "better": self.better,
            "verdict": self.verdict,
            "candidates": list(self.candidates),
            "sensitivity": {side: self.sensitivity[:, i].tolist() for i, side in enumerate(SIDES)},
            "layers": layer_spellings(self.format, len(self.sensitivity)),
        }


def _summary(run: Run) -> str:
    kl = small(run.kl_mean, run.metrics["kl_mean_se"])
    return f"KL {kl} at {run.bits_per_element:.2f} bits"
