"""Accuracy against memory: every format of the cache, measured on a model and a text."""

from qpaged.sweep._extras import MissingExtraError, need_sweep_extra
from qpaged.sweep._figure import write_figure, write_figures
from qpaged.sweep._formats import FormatInfo, fitting, installed_formats
from qpaged.sweep._metrics import Accuracy
from qpaged.sweep._model import Model, load_model
from qpaged.sweep._progress import progress_bar
from qpaged.sweep._report import write_report
from qpaged.sweep._result import SweepResult, pareto_front, write_json
from qpaged.sweep._run import Failure, Run, Sweep, sweep_order
from qpaged.sweep._settings import DTYPES, Settings
from qpaged.sweep._table import print_table
from qpaged.sweep._text import Text, load_text
from qpaged.sweep._verdict import verdict

__all__ = [
    "DTYPES",
    "Accuracy",
    "Failure",
    "FormatInfo",
    "MissingExtraError",
    "Model",
    "Run",
    "Settings",
    "Sweep",
    "SweepResult",
    "Text",
    "fitting",
    "installed_formats",
    "load_model",
    "load_text",
    "need_sweep_extra",
    "pareto_front",
    "print_table",
    "progress_bar",
    "sweep_order",
    "verdict",
    "write_figure",
    "write_figures",
    "write_json",
    "write_report",
]
