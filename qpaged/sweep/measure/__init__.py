"""Measures formats of the cache: models, texts, predictions, and the metrics computed from them."""

from qpaged.sweep.measure._attention import AttentionProfile
from qpaged.sweep.measure._bench import Bench, Progress
from qpaged.sweep.measure._decoder import Decoder, load_model
from qpaged.sweep.measure._decoder_stream import chunks
from qpaged.sweep.measure._load_step import load_step
from qpaged.sweep.measure._metrics import METRICS, WIDE, Metric, Predictions, TableColumn
from qpaged.sweep.measure._model import Model, Prefilled, Stream
from qpaged.sweep.measure._needles import Needles, NeedleScore, find, hide
from qpaged.sweep.measure._predictions import Reference, predict
from qpaged.sweep.measure._run import (
    PLAIN,
    Accuracy,
    Failure,
    Greedy,
    Noise,
    Run,
    identity,
    layer_spellings,
)
from qpaged.sweep.measure._settings import COMPUTE_DTYPES, DTYPES, Settings
from qpaged.sweep.measure._statistics import Estimate, token_estimate
from qpaged.sweep.measure._step import StepModel
from qpaged.sweep.measure._sweep import Sweep, sweep_order
from qpaged.sweep.measure._tasks import Question, Task, TaskScore, load_task
from qpaged.sweep.measure._text import Sequences, Text, cut, load_text

__all__ = [
    "COMPUTE_DTYPES",
    "DTYPES",
    "METRICS",
    "PLAIN",
    "WIDE",
    "Accuracy",
    "AttentionProfile",
    "Bench",
    "Decoder",
    "Estimate",
    "Failure",
    "Greedy",
    "Metric",
    "Model",
    "NeedleScore",
    "Needles",
    "Noise",
    "Predictions",
    "Prefilled",
    "Progress",
    "Question",
    "Reference",
    "Run",
    "Sequences",
    "Settings",
    "StepModel",
    "Stream",
    "Sweep",
    "TableColumn",
    "Task",
    "TaskScore",
    "Text",
    "chunks",
    "cut",
    "find",
    "hide",
    "identity",
    "layer_spellings",
    "load_model",
    "load_step",
    "load_task",
    "load_text",
    "predict",
    "sweep_order",
    "token_estimate",
]
