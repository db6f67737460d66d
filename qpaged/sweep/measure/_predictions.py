"""Predictions of a model through its cache: teacher-forced the way a server does it, and greedy."""

import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qpaged.sweep._metrics import Predictions, compare
from qpaged.sweep._model import Model, Stream
from qpaged.sweep._settings import Settings

IN_MEMORY = 2**30
"""Bytes of the reference's outputs from which on they are kept in a temporary file."""

Advance = Callable[[int], None]
"""Called with the number of tokens that were done since the last call."""


class Part(NamedTuple):
    """Predictions of some rows and columns of the tokens.

    Attributes:
        outputs: (rows, columns, features), what logits are made of.
        logits: (rows, columns, vocabulary).
        seconds: wall-clock, from the tokens to the logits.
        decoded: whether it is one step of a decode.
    """

    rows: slice
    columns: slice
    outputs: jax.Array
    logits: jax.Array
    seconds: float
    decoded: bool


@dataclass
class Timing:
    """Medians, so that compilations do not count."""

    prefill: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)

    def add(self, part: Part) -> None:
        """Note a part's seconds: of a decode step, or of one token of a prefill."""
        tokens = part.logits.shape[0] * part.logits.shape[1]
        (self.decode if part.decoded else self.prefill).append(part.seconds / (1 if part.decoded else tokens))

    @property
    def per_decode_step(self) -> float | None:
        return statistics.median(self.decode) if self.decode else None

    @property
    def per_prefilled_token(self) -> float | None:
        return statistics.median(self.prefill) if self.prefill else None


def teacher_forced(model: Model, stream: Stream, tokens: np.ndarray, settings: Settings) -> Iterator[Part]:
    """Predictions of all ``tokens`` (sequences, context), batch by batch.

    Each sequence is prefilled in chunks, then all of a batch decode their last tokens together. What a token
    attends to has always been through the cache.
    """
    for first in range(0, len(tokens), settings.batch):
        held = tokens[first : first + settings.batch]
        stream.begin(len(held))
        prefill, began = stream.prefill(held[:, : settings.prefilled]), time.perf_counter()
        for rows, columns, outputs in prefill:
            rows = slice(first + rows.start, first + rows.stop)
            yield _part(model, rows, columns, outputs, began, False)
            began = time.perf_counter()
        for index in range(settings.prefilled, settings.context):
            began = time.perf_counter()
            outputs = stream.decode(held[:, index], index)[:, None]
            yield _part(model, slice(first, first + len(held)), slice(index, index + 1), outputs, began, True)


def _part(model: Model, rows: slice, columns: slice, outputs: jax.Array, began: float, decoded: bool) -> Part:
    logits = jax.block_until_ready(model.logits(outputs))
    return Part(rows, columns, outputs, logits, time.perf_counter() - began, decoded)


def greedy(model: Model, stream: Stream, prompts: np.ndarray, settings: Settings) -> np.ndarray:
    """The likeliest continuations (sequences, :attr:`Settings.continued`) of prompts (sequences, tokens)."""
    found = np.empty((len(prompts), settings.continued), np.int32)
    for first in range(0, len(prompts), settings.batch):
        held = prompts[first : first + settings.batch]
        stream.begin(len(held))
        chosen = np.empty(len(held), np.int32)
        for rows, _, outputs in stream.prefill(held):  # the last chunk's choice stays
            chosen[rows] = _likeliest(model.logits(outputs[:, -1]))
        for index in range(settings.continued):
            found[first : first + len(held), index] = chosen
            if index + 1 < settings.continued:
                chosen = _likeliest(model.logits(stream.decode(chosen, held.shape[1] + index)))
    return found


def _likeliest(logits: jax.Array) -> np.ndarray:
    return np.asarray(jnp.argmax(logits, axis=-1), np.int32)


class Reference:
    """What the plain cache predicted: its outputs, from which logits are made again part by part.

    A decoder's outputs are its last hidden states, so that a vocabulary's worth of logits is never kept.
    """

    def __init__(self, model: Model, shape: tuple[int, int]):
        self._model, self._shape = model, shape
        self._outputs: np.ndarray | None = None

    def add(self, part: Part) -> None:
        """Keep a part's outputs."""
        if self._outputs is None:
            self._outputs = _room((*self._shape, part.outputs.shape[-1]))
        self._outputs[part.rows, part.columns] = np.asarray(part.outputs, np.float32)

    def logits(self, part: Part) -> jax.Array:
        """Of the same tokens as the part's."""
        assert self._outputs is not None
        return self._model.logits(jnp.asarray(self._outputs[part.rows, part.columns]))


def _room(shape: tuple[int, ...]) -> np.ndarray:
    """An array of float32, in a temporary file where it is large."""
    if 4 * math.prod(shape) < IN_MEMORY:
        return np.empty(shape, np.float32)
    return np.memmap(tempfile.TemporaryFile(), np.float32, "w+", shape=shape)


def predictions(
    model: Model,
    stream: Stream,
    tokens: np.ndarray,
    settings: Settings,
    reference: Reference | None,
    advance: Advance,
) -> tuple[Predictions, Timing, Reference]:
    """All predictions of ``tokens`` (sequences, context + 1), beside those of the ``reference``.

    Without a reference they are their own, and are returned as one.
    """
    fed, truth = tokens[:, :-1], tokens[:, 1:]
    kept = reference or Reference(model, fed.shape)
    found = Predictions(*(np.empty(truth.shape, dtype) for dtype in (float, float, float, bool)))
    timing = Timing()
    for part in teacher_forced(model, stream, fed, settings):
        if reference is None:
            kept.add(part)
        place = part.rows, part.columns
        plain = part.logits if reference is None else kept.logits(part)
        for whole, piece in zip(found, compare(plain, part.logits, truth[place]), strict=True):
            whole[place] = piece
        timing.add(part)
        advance(truth[place].size)
    return found, timing, kept
