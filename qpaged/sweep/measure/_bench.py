"""The sweep: the reference, then every format."""

import dataclasses
import functools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np

from qpaged.quantizer import CacheFormat
from qpaged.sweep._attention import AttentionProfile
from qpaged.sweep._metrics import Accuracy, jackknife, measure_accuracy
from qpaged.sweep._model import Model, Stream
from qpaged.sweep._predict import Reference, Timing, greedy, predictions
from qpaged.sweep._settings import Settings
from qpaged.sweep._text import Sequences, Text, cut

PLAIN = CacheFormat()
BF16_BYTES = 2

Report = Callable[[str, int], None]
"""report(format, tokens): so many more tokens of this format are done."""


@dataclass(frozen=True)
class Greedy:
    """Greedy continuations beside the reference's; standard errors over prompts.

    Attributes:
        first_difference: the index of the first token that differs, the continuation's length where none
            does; the mean over prompts.
        same: share of prompts that are continued alike.
    """

    first_difference: float
    first_difference_se: float | None
    same: float
    same_se: float | None


@dataclass(frozen=True)
class Run:
    """One format, measured.

    Attributes:
        format: as it was asked for.
        identity: what it is; see :func:`identity`.
        key: the canonical spelling of the keys' format.
        value: of the values'.
        layers: (key, value) of each layer, where they differ by layer; else None.
        dtype: the logical dtype of the cache.
        bytes_per_token: of the allocated cache, keys and values of all layers, scales included.
        ratio: bytes of the same cache in bfloat16 over these.
        bits_per_element: likewise, over the elements of keys and values.
        accuracy: its predictions beside the reference's.
        greedy: its own continuations beside the reference's.
        attention: of each layer by itself; None for models whose layers cannot be seen into.
        decode_seconds_per_step: median, of a whole batch; None where nothing was decoded.
        prefill_seconds_per_token: median.
        tokens: predicted tokens.
        seconds: wall-clock, compilation included.
    """

    format: str
    identity: str
    key: str
    value: str
    layers: list[list[str]] | None
    dtype: str
    bytes_per_token: float
    ratio: float
    bits_per_element: float
    accuracy: Accuracy
    greedy: Greedy
    attention: AttentionProfile | None
    decode_seconds_per_step: float | None
    prefill_seconds_per_token: float | None
    tokens: int
    seconds: float

    @property
    def worst_attention_error(self) -> float | None:
        """The largest error of a layer."""
        return None if self.attention is None else max(self.attention.error)


@dataclass(frozen=True)
class Failure:
    """One format that could not be measured, and why."""

    format: str
    error: str


def identity(format: CacheFormat) -> str:
    """All that makes a format, as one line of JSON."""
    return json.dumps(format.config, sort_keys=True, separators=(",", ":"))


def spellings(format: CacheFormat, layers: int) -> list[list[str]]:
    """Of the keys' and the values' formats, for each layer."""
    return [[str(CacheFormat(part, part)) for part in format.layer(layer)] for layer in range(layers)]


def sweep_order(formats: Sequence[str]) -> list[tuple[str, CacheFormat]]:
    """What is run, by name: the plain reference first, each once. Names are spellings, or files' names.

    Raises:
        RegistryError: a spelling that names no installed format.
        OSError, ValueError: a file of a format that cannot be read.
    """
    files = [Path(spelling).name for spelling in formats if spelling.endswith(".json")]

    def name(spelling: str) -> str:
        file = Path(spelling).name
        return file if files.count(file) == 1 else spelling

    asked: dict[str, CacheFormat] = {}
    for spelling in formats:
        format = CacheFormat.of(spelling)
        if format not in asked.values():
            asked[name(spelling)] = format
    plain = [(spelling, format) for spelling, format in asked.items() if format == PLAIN]
    rest = [(spelling, format) for spelling, format in asked.items() if format != PLAIN]
    return [*(plain[:1] or [("plain", PLAIN)]), *rest]


@dataclass(frozen=True)
class Sweep:
    """A sweep to be run: formats, the plain float32 reference first, on a model and a text.

    Attributes:
        formats: spellings, as :meth:`qpaged.CacheFormat.of` takes them; the reference is added if missing.

    Raises:
        RegistryError: a spelling that names no installed format.
        ValueError: a text shorter than one sequence, or a context longer than the model's.
    """

    model: Model
    text: Text
    formats: tuple[str, ...]
    settings: Settings

    def __post_init__(self) -> None:
        longest = self.model.longest
        if self.settings.context > longest:
            raise ValueError(
                f"context must be at most {longest:,}, the longest that {self.model.name} was made for, "
                f"but came as {self.settings.context:,}."
            )
        tokenizer = self.model.tokenizer
        if tokenizer.vocab_size > self.model.vocabulary:
            raise ValueError(
                f"tokenizer must have at most the {self.model.vocabulary:,} tokens of the model, but "
                f"{tokenizer.name} has {tokenizer.vocab_size:,}; use the one that the model was trained with."
            )
        _ = self.order, self.sequences  # both raise where they cannot be had

    @cached_property
    def order(self) -> list[tuple[str, CacheFormat]]:
        """Each spelling once, with what it stands for; the reference first."""
        return sweep_order(self.formats)

    @cached_property
    def sequences(self) -> Sequences:
        """What is fed and predicted."""
        return cut(self.text, self.model.tokenizer, self.settings)

    @property
    def tokens(self) -> int:
        """Tokens that each format predicts."""
        return len(self.sequences.tokens) * self.settings.context

    def pending(self, known: Sequence[Run]) -> list[str]:
        """The formats that are to be measured where some are known; the reference among them, if any is."""
        done = {run.identity for run in known}
        rest = [spelling for spelling, format in self.order if identity(format) not in done]
        plain = self.order[0][0]
        return rest if not rest or rest[0] == plain else [plain, *rest]

    def run(self, report: Report, known: Sequence[Run] = ()) -> Iterator[Run | Failure]:
        """Measure format by format; whoever stops early keeps what came.

        What is ``known`` from an earlier sweep of the same is not measured again.
        A format that fails is yielded as a failure, and the others go on; without the reference there is
        nothing to measure, and its error is raised.
        """
        done = {run.identity: run for run in known}
        (plain, _), *rest = self.order
        measured = self.pending(known)
        bench = Bench(self.model, self.sequences, self.settings, plain, report) if measured else None
        yield bench.plain if bench is not None else dataclasses.replace(done[identity(PLAIN)], format=plain)
        for spelling, format in rest:
            if identity(format) in done:
                yield dataclasses.replace(done[identity(format)], format=spelling)
                continue
            assert bench is not None
            try:
                yield bench.measure(spelling, format)
            except Exception as error:  # a plugin's own; the other formats are still worth having
                yield Failure(spelling, " ".join(f"{type(error).__name__}: {error}".split()))


class Bench:
    """A model and a text with what the plain cache makes of them; formats are measured beside that."""

    def __init__(self, model: Model, sequences: Sequences, settings: Settings, plain: str, report: Report):
        self._model, self._sequences, self._settings, self._report = model, sequences, settings, report
        self._spelling = plain
        self._reference: Reference | None = None
        self._plain = self._predict(plain, PLAIN)

    @cached_property
    def plain(self) -> Run:
        """The run of the plain cache, which is the reference."""
        return self.measure(self._spelling, PLAIN)

    @cached_property
    def _continued(self) -> np.ndarray:
        return self._continue(self._plain.stream)

    def accuracy(self, spelling: str, format: CacheFormat) -> Accuracy:
        """Of the predictions alone."""
        return self._predict(spelling, format).accuracy

    def measure(self, spelling: str, format: CacheFormat) -> Run:
        """All that there is to measure."""
        model, settings = self._model, self._settings
        began = time.perf_counter()
        if format == PLAIN:
            made, continued = self._plain, self._continued
        else:
            made = self._predict(spelling, format)
            continued = self._continue(made.stream)
        profile = model.attention_profile(format, self._sequences.tokens[:, :-1], settings)
        size = made.stream.bytes_per_token
        return Run(
            format=spelling,
            identity=identity(format),
            key=str(CacheFormat(format.key, format.key)),
            value=str(CacheFormat(format.value, format.value)),
            layers=spellings(format, model.layers or 0) if format.layers else None,
            dtype=made.stream.dtype,
            bytes_per_token=size,
            ratio=BF16_BYTES * model.elements_per_token / size,
            bits_per_element=8 * size / model.elements_per_token,
            accuracy=made.accuracy,
            greedy=compare_greedy(self._continued, continued),
            attention=profile,
            decode_seconds_per_step=made.timing.per_decode_step,
            prefill_seconds_per_token=made.timing.per_prefilled_token,
            tokens=self._sequences.bytes.size,
            seconds=time.perf_counter() - began + (made.seconds if format == PLAIN else 0),
        )

    def _predict(self, spelling: str, format: CacheFormat) -> "Predicted":
        """Predictions of the whole text; the first are the reference."""
        began = time.perf_counter()
        stream = self._model.stream(
            format, self._settings, min(self._settings.batch, len(self._sequences.tokens))
        )
        advance = functools.partial(self._report, spelling)
        found, timing, reference = predictions(
            self._model, stream, self._sequences.tokens, self._settings, self._reference, advance
        )
        self._reference = reference
        accuracy = measure_accuracy(found, self._sequences.bytes)
        return Predicted(accuracy, stream, timing, time.perf_counter() - began)

    def _continue(self, stream: Stream) -> np.ndarray:
        prompts = self._sequences.tokens[: self._settings.prompts, : self._settings.prompt]
        return greedy(self._model, stream, prompts, self._settings)


class Predicted(NamedTuple):
    """Predictions in a format, the stream they went through, and the time they took."""

    accuracy: Accuracy
    stream: Stream
    timing: Timing
    seconds: float


def compare_greedy(reference: np.ndarray, found: np.ndarray) -> Greedy:
    """Continuations (prompts, tokens) beside the reference's."""
    differs = np.concatenate([reference != found, np.ones((len(found), 1), bool)], axis=1)
    first, same = differs.argmax(axis=1), (reference == found).all(axis=1)
    units = np.stack([np.ones(len(found)), first, same], axis=1).astype(np.float64)
    index, index_se = jackknife(units, lambda total: total[1] / total[0])
    share, share_se = jackknife(units, lambda total: total[2] / total[0])
    return Greedy(index, index_se, share, share_se)
