"""Accuracy against memory: measures every format of the cache on a model and a text.

``measure`` runs models and computes metrics, ``results`` keeps them as JSON, ``tune`` searches for a format
of each layer, and ``report`` shows results.
"""

from qpaged.sweep._extras import MissingExtraError, need_sweep_extra
from qpaged.sweep._formats import FormatInfo, fitting, installed_formats
from qpaged.sweep.measure import (
    DTYPES,
    METRICS,
    Accuracy,
    AttentionProfile,
    Decoder,
    Failure,
    Greedy,
    Metric,
    Model,
    Run,
    Settings,
    StepModel,
    Stream,
    Sweep,
    Text,
    load_model,
    load_step,
    load_text,
    sweep_order,
)
from qpaged.sweep.report import print_table, progress_bar, verdict, write_figures, write_report
from qpaged.sweep.results import (
    RESULTS,
    SweepResult,
    conditions,
    known_runs,
    same_conditions,
    set_aside,
    write_json,
)
from qpaged.sweep.tune import (
    CANDIDATES,
    Budget,
    Journal,
    Tune,
    Tuned,
    UnattainableError,
    default_candidates,
)

__all__ = [
    "CANDIDATES",
    "DTYPES",
    "METRICS",
    "RESULTS",
    "Accuracy",
    "AttentionProfile",
    "Budget",
    "Decoder",
    "Failure",
    "FormatInfo",
    "Greedy",
    "Journal",
    "Metric",
    "MissingExtraError",
    "Model",
    "Run",
    "Settings",
    "StepModel",
    "Stream",
    "Sweep",
    "SweepResult",
    "Text",
    "Tune",
    "Tuned",
    "UnattainableError",
    "conditions",
    "default_candidates",
    "fitting",
    "installed_formats",
    "known_runs",
    "load_model",
    "load_step",
    "load_text",
    "need_sweep_extra",
    "print_table",
    "progress_bar",
    "same_conditions",
    "set_aside",
    "sweep_order",
    "verdict",
    "write_figures",
    "write_json",
    "write_report",
]
