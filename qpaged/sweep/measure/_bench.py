"""Measures one format after another beside the plain cache, the reference."""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import cast

import numpy as np

from qpaged.formats import CacheFormat
from qpaged.sweep.measure._attention import AttentionProfile
from qpaged.sweep.measure._greedy import greedy_continuations
from qpaged.sweep.measure._metrics import Measurement, Predictions, compute_metrics
from qpaged.sweep.measure._model import Model, RaggedStream, Stream
from qpaged.sweep.measure._needles import Needles, NeedleScore, find
from qpaged.sweep.measure._predictions import Reference, Timing, predict
from qpaged.sweep.measure._run import PLAIN, Noise, Run, identity, layer_spellings
from qpaged.sweep.measure._settings import Settings
from qpaged.sweep.measure._statistics import by_position, kl_histogram, part_means, token_estimate
from qpaged.sweep.measure._tasks import (
    TASK_CHUNK,
    Answers,
    Continuation,
    Task,
    TaskScore,
    answers_of,
    log_likelihoods,
    score,
)
from qpaged.sweep.measure._text import Sequences

Progress = Callable[[str, int], None]
"""progress(spelling, tokens) is called when so many more tokens of this format are done."""


@dataclass(frozen=True)
class _Predicted:
    """Predictions in a format, the stream that they went through, and the time they took."""

    predictions: Predictions[np.ndarray]
    stream: Stream
    timing: Timing
    seconds: float


class Bench:
    """A model and a text with the plain cache's predictions, beside which formats are measured.

    Args:
        plain: the spelling under which the reference is reported.
        tasks: that each format answers, with their choices in tokens.
        needles: texts with numbers that are to be found through each format's cache.
    """

    def __init__(
        self,
        model: Model,
        sequences: Sequences,
        settings: Settings,
        plain: str,
        progress: Progress,
        tasks: Iterable[tuple[Task, list[Continuation]]] = (),
        needles: Iterable[Needles] = (),
    ):
        self._model = model
        self._sequences = sequences
        self._settings = settings
        self._reference_spelling = plain
        self._progress = progress
        self._tasks = list(tasks)
        self._needles = list(needles)
        self._plain_answers: list[Answers] | None = None
        self._reference: Reference | None = None
        self._plain_predicted = self._predict(plain, PLAIN)
        if not np.isfinite(self._plain_predicted.predictions.log_q).all():
            raise ValueError(
                f"{model.name} gives NaN or infinite logits on the plain cache; check its weights."
            )

    @cached_property
    def plain(self) -> Run:
        """The run of the plain cache, which is the reference."""
        run = self.measure(self._reference_spelling, PLAIN)
        return dataclasses.replace(run, noise=self._noise() if self._settings.noise else None)

    def _noise(self) -> list[Noise]:
        """Return how far the reference is from itself in other chunks and batches, and in another dtype."""
        settings = self._settings
        smaller = settings.halved(len(self._sequences.tokens))
        found = []
        if smaller is not None:
            conditions = f"chunks of {smaller.chunk}, {smaller.batch} sequences at once"
            found.append(self._noise_of(conditions, self._model, smaller))
        other = self._model.in_another_dtype()
        if other is not None:
            dtype, model = other
            found.append(self._noise_of(f"computing in {dtype}", model, settings))
        return found

    def _noise_of(self, conditions: str, model: Model, settings: Settings) -> Noise:
        kl = self._predict(self._reference_spelling, PLAIN, model, settings).predictions.kl
        mean, error = token_estimate(lambda sums: sums[0] / sums[1], kl, np.ones_like(kl))
        assert mean is not None  # tokens were counted
        return {"conditions": conditions, "kl_mean": mean, "kl_mean_se": error, "kl_parts": part_means(kl)}

    def mean_kl(self, spelling: str, cache_format: CacheFormat) -> float:
        """Predict in a format, and return the mean KL alone.

        A search needs no more, and saves the time of continuations and of attention by layer.
        """
        kl = self._predict(spelling, cache_format).predictions.kl
        if not np.isfinite(kl).all():
            raise ValueError("the model's logits are not finite")
        return float(kl.mean())

    def measure(self, spelling: str, cache_format: CacheFormat) -> Run:
        """Measure everything of a format."""
        start = time.perf_counter()
        if cache_format == PLAIN:
            predicted, continuations = self._plain_predicted, self._plain_continuations
            start -= predicted.seconds  # The reference was predicted before, when the bench was made.
        else:
            predicted = self._predict(spelling, cache_format)
            continuations = self._continue(predicted.stream)
        attention = None
        if self._settings.probed:
            tokens = self._sequences.tokens[:, :-1]
            attention = self._model.attention_profile(
                self._plain_predicted.stream, predicted.stream, tokens, self._settings
            )
        measurement = self._measurement(predicted, continuations, attention)
        of_positions = by_position(predicted.predictions.kl)
        layers = None
        if cache_format.layers:
            layers = layer_spellings(cache_format, self._model.layers or 0)
        return Run(
            format=spelling,
            identity=identity(cache_format),
            key=str(CacheFormat(cache_format.key, cache_format.key)),
            value=str(CacheFormat(cache_format.value, cache_format.value)),
            layers=layers,
            dtype=predicted.stream.dtype,
            metrics=compute_metrics(measurement),
            kl_parts=part_means(predicted.predictions.kl),
            kl_histogram=kl_histogram(predicted.predictions.kl),
            kl_by_position=[mean for mean, _ in of_positions if mean is not None],
            kl_by_position_se=[error for _, error in of_positions],
            attention=attention,
            tasks=self._answer(spelling, cache_format) if self._tasks else None,
            needles=self._find(spelling, cache_format) if self._needles else None,
            tokens=self._sequences.bytes.size,
            seconds=time.perf_counter() - start,
        )

    def _measurement(
        self, predicted: _Predicted, continuations: np.ndarray, attention: AttentionProfile | None
    ) -> Measurement:
        return Measurement(
            predictions=predicted.predictions,
            token_bytes=self._sequences.bytes,
            continuations=continuations,
            reference_continuations=self._plain_continuations,
            attention=attention,
            bytes_per_token=predicted.stream.bytes_per_token,
            elements_per_token=self._model.elements_per_token,
            decode_seconds_per_step=predicted.timing.per_decode_step,
            prefill_seconds_per_token=predicted.timing.per_prefilled_token,
        )

    @cached_property
    def _plain_continuations(self) -> np.ndarray:
        return self._continue(self._plain_predicted.stream)

    def _predict(
        self,
        spelling: str,
        cache_format: CacheFormat,
        model: Model | None = None,
        settings: Settings | None = None,
    ) -> _Predicted:
        """Predict the whole text; the first predictions become the reference.

        Args:
            model: what computes, if that is not the bench's own model, which makes logits of it.
            settings: likewise.
        """
        start = time.perf_counter()
        settings = settings or self._settings
        sequences = min(settings.batch, len(self._sequences.tokens))
        stream = (model or self._model).stream(cache_format, settings, sequences)

        def advance(tokens: int) -> None:
            self._progress(spelling, tokens)

        predictions, timing, self._reference = predict(
            self._model, stream, self._sequences.tokens, settings, self._reference, advance
        )
        return _Predicted(predictions, stream, timing, time.perf_counter() - start)

    def _answer(self, spelling: str, cache_format: CacheFormat) -> list[TaskScore]:
        """Answer all tasks; the first answers are the reference's."""
        settings = dataclasses.replace(self._settings, chunk=min(TASK_CHUNK, self._settings.chunk))
        batch = settings.batch
        # A sweep has seen that the model takes_ragged.
        stream = cast(RaggedStream, self._model.stream(cache_format, settings, batch))
        answers = []
        for task, continuations in self._tasks:
            likelihoods = log_likelihoods(
                self._model, stream, continuations, batch, functools.partial(self._progress, spelling)
            )
            if not np.isfinite(likelihoods).all():
                raise ValueError(f"the model's logits are not finite in {task.name}")
            answers.append(answers_of(task, likelihoods))
        if self._plain_answers is None:
            self._plain_answers = answers
        return [
            score(task, own, plain)
            for (task, _), own, plain in zip(self._tasks, answers, self._plain_answers, strict=True)
        ]

    def _find(self, spelling: str, cache_format: CacheFormat) -> list[NeedleScore]:
        """Return what is found of the numbers in texts of each length."""
        scores = []
        for needles in self._needles:
            settings = self._settings.of_needles(needles.length)
            stream = self._model.stream(cache_format, settings, settings.batch)
            advance = functools.partial(self._progress, spelling)
            scores.append(find(self._model, stream, needles, settings, advance))
        return scores

    def _continue(self, stream: Stream) -> np.ndarray:
        prompts = self._sequences.tokens[: self._settings.prompts, : self._settings.prompt]
        return greedy_continuations(self._model, stream, prompts, self._settings)
