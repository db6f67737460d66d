"""The record of one format: what it is, and what was measured of it."""

import json
import warnings
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TypedDict

from qpaged.formats import CacheFormat
from qpaged.sweep.measure._attention import AttentionProfile
from qpaged.sweep.measure._needles import NeedleScore
from qpaged.sweep.measure._statistics import Histogram
from qpaged.sweep.measure._tasks import TaskScore

PLAIN = CacheFormat()


class Accuracy(SimpleNamespace):
    """Metrics of predictions as attributes, as :attr:`Run.accuracy` had them; use :attr:`Run.metrics`."""


class Greedy(SimpleNamespace):
    """Metrics of continuations as attributes, as :attr:`Run.greedy` had them; use :attr:`Run.metrics`."""


class Noise(TypedDict):
    """How far the reference is from itself under other conditions, which no format chooses.

    A format that is no further from it cannot be told from it on such a system.

    Attributes:
        conditions: in words, such as "computing in bfloat16".
        kl_mean: nats a token.
        kl_mean_se: its standard error, or None.
        kl_parts: as those of a :class:`Run`.
    """

    conditions: str
    kl_mean: float
    kl_mean_se: float | None
    kl_parts: list[float]


@dataclass(frozen=True)
class Run:
    """One format, measured.

    Attributes:
        format: as the user typed it.
        identity: see :func:`identity`.
        key: the canonical spelling of the keys' format.
        value: the canonical spelling of the values' format.
        layers: (key, value) spellings of each layer, where layers differ; else None.
        dtype: the logical dtype of the cache.
        metrics: the value of each of :data:`METRICS` by its key, and standard errors under ``<key>_se``.
        kl_parts: mean KL of each part of the text over which standard errors are taken.
        kl_histogram: of the KL of all tokens.
        attention: errors of each layer by itself; None for models whose layers cannot be inspected.
        tokens: number of predicted tokens.
        seconds: wall-clock time, compilation included.
        noise: of the reference; None for other formats, and where it was not measured.
        tasks: how the format answers each task; None where there are none.
        needles: what is found of numbers hidden in texts of each length; None where none were.
        kl_by_position: mean KL of eight parts of the sequences, from the first tokens to the last; None in
            results of earlier versions.
        kl_by_position_se: their standard errors.
    """

    format: str
    identity: str
    key: str
    value: str
    layers: list[list[str]] | None
    dtype: str
    metrics: dict[str, float | None]
    kl_parts: list[float]
    kl_histogram: Histogram
    attention: AttentionProfile | None
    tokens: int
    seconds: float
    noise: list[Noise] | None = None
    tasks: list[TaskScore] | None = None
    needles: list[NeedleScore] | None = None
    kl_by_position: list[float] | None = None
    kl_by_position_se: list[float | None] | None = None

    @property
    def bytes_per_token(self) -> float:
        return self._number("bytes_per_token")

    @property
    def bits_per_element(self) -> float:
        return self._number("bits_per_element")

    @property
    def ratio(self) -> float:
        return self._number("ratio")

    @property
    def kl_mean(self) -> float:
        return self._number("kl_mean")

    @property
    def accuracy(self) -> Accuracy:
        """Deprecated; :attr:`metrics` has these numbers."""
        _warn_moved("accuracy")
        return Accuracy(**self.metrics, kl_parts=self.kl_parts, kl_histogram=self.kl_histogram)

    @property
    def greedy(self) -> Greedy:
        """Deprecated; :attr:`metrics` has these numbers under ``greedy_...``."""
        _warn_moved("greedy")
        prefix = "greedy_"
        keys = [key for key in self.metrics if key.startswith(prefix)]
        return Greedy(**{key.removeprefix(prefix): self.metrics[key] for key in keys})

    @property
    def worst_attention_error(self) -> float | None:
        """Deprecated; :attr:`metrics` has it as ``attention_error``."""
        _warn_moved("worst_attention_error")
        return self.metrics["attention_error"]

    @property
    def decode_seconds_per_step(self) -> float | None:
        """Deprecated; :attr:`metrics` has it."""
        _warn_moved("decode_seconds_per_step")
        return self.metrics["decode_seconds_per_step"]

    @property
    def prefill_seconds_per_token(self) -> float | None:
        """Deprecated; :attr:`metrics` has it."""
        _warn_moved("prefill_seconds_per_token")
        return self.metrics["prefill_seconds_per_token"]

    def _number(self, key: str) -> float:
        """Return a metric that every run has."""
        value = self.metrics[key]
        assert value is not None
        return value


@dataclass(frozen=True)
class Failure:
    """One format that could not be measured, and why."""

    format: str
    error: str

    @classmethod
    def of(cls, spelling: str, error: Exception) -> "Failure":
        """Describe an exception in one line."""
        return cls(spelling, " ".join(f"{type(error).__name__}: {error}".split()))


def identity(cache_format: CacheFormat) -> str:
    """Return the complete configuration of a format as one line of JSON, to tell whether two are the same."""
    return json.dumps(cache_format.config, sort_keys=True, separators=(",", ":"))


def layer_spellings(cache_format: CacheFormat, layers: int) -> list[list[str]]:
    """Return the spellings of the keys' and the values' format for each layer."""
    spellings = []
    for layer in range(layers):
        key, value = cache_format.layer(layer)
        spellings.append([str(CacheFormat(key, key)), str(CacheFormat(value, value))])
    return spellings


def _warn_moved(attribute: str) -> None:
    message = f"Run.{attribute} is now Run.metrics; the old name goes with the next version."
    warnings.warn(message, DeprecationWarning, stacklevel=3)
