"""Accuracy against memory: every format of the cache, measured on a model and a text."""

from qpaged.sweep._attention import AttentionProfile
from qpaged.sweep._decoder import Decoder, load_model
from qpaged.sweep._extras import MissingExtraError, need_sweep_extra
from qpaged.sweep._figure import write_figures
from qpaged.sweep._formats import FormatInfo, fitting, installed_formats
from qpaged.sweep._metrics import Accuracy
from qpaged.sweep._model import Model, Stream
from qpaged.sweep._progress import progress_bar
from qpaged.sweep._report import write_report
from qpaged.sweep._result import (
    RESULTS,
    SweepResult,
    conditions,
    known_runs,
    same_conditions,
    set_aside,
    write_json,
)
from qpaged.sweep._run import Failure, Greedy, Run, Sweep, sweep_order
from qpaged.sweep._settings import DTYPES, Settings
from qpaged.sweep._step import StepModel, load_step
from qpaged.sweep._table import print_table
from qpaged.sweep._text import Text, load_text
from qpaged.sweep._tune import (
    CANDIDATES,
    Budget,
    Journal,
    Tune,
    Tuned,
    UnattainableError,
    default_candidates,
)
from qpaged.sweep._verdict import verdict

__all__ = [
    "CANDIDATES",
    "DTYPES",
    "RESULTS",
    "Accuracy",
    "AttentionProfile",
    "Budget",
    "Decoder",
    "Failure",
    "FormatInfo",
    "Greedy",
    "Journal",
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
