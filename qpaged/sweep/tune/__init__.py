"""Tunes a format for each layer, keys and values apart, within a budget of bits or KL."""

from qpaged.sweep.tune._budget import Budget, UnattainableError
from qpaged.sweep.tune._candidates import CANDIDATES, default_candidates
from qpaged.sweep.tune._export import EXPORTS
from qpaged.sweep.tune._journal import Journal
from qpaged.sweep.tune._search import Tune
from qpaged.sweep.tune._tuned import Tuned

__all__ = [
    "CANDIDATES",
    "EXPORTS",
    "Budget",
    "Journal",
    "Tune",
    "Tuned",
    "UnattainableError",
    "default_candidates",
]
