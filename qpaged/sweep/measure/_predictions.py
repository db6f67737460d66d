"""Predicts every token of a text through a model's cache, teacher-forced the way a server runs."""

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

from qpaged.sweep.measure._metrics import Predictions, compare
from qpaged.sweep.measure._model import Model, Stream
from qpaged.sweep.measure._settings import Settings

MAX_IN_MEMORY = 2**30
"""Bytes of the reference's outputs from which on they are kept in a temporary file."""

Advance = Callable[[int], None]
"""advance(tokens) is called with the number of tokens that were predicted since the last call."""


class Part(NamedTuple):
    """Predictions of some rows and columns of the tokens.

    Attributes:
        outputs: the model's outputs, from which logits are computed.
        seconds: wall-clock time, from the tokens to the logits.
        decoded: True for one step of a decode, False for a chunk of a prefill.
    """

    rows: slice
    columns: slice
    outputs: jax.Array  # [rows, columns, features]
    logits: jax.Array  # [rows, columns, vocabulary]
    seconds: float
    decoded: bool


@dataclass
class Timing:
    """Seconds of each decode step, and of each prefilled token.

    Their medians are reported, so that compilations, which slow a few calls down, do not count.
    """

    prefill: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)

    def add(self, part: Part) -> None:
        """Note the seconds of a part."""
        if part.decoded:
            self.decode.append(part.seconds)
        else:
            rows, columns, _ = part.logits.shape
            self.prefill.append(part.seconds / (rows * columns))

    @property
    def per_decode_step(self) -> float | None:
        return _median(self.decode)

    @property
    def per_prefilled_token(self) -> float | None:
        return _median(self.prefill)


class Reference:
    """The plain cache's outputs, from which its logits are computed again part by part.

    A decoder's outputs are its last hidden states, so that logits over the whole vocabulary are never stored.
    """

    def __init__(self, model: Model, shape: tuple[int, int]):
        self._model, self._shape = model, shape
        self._outputs: np.ndarray | None = None

    def add(self, part: Part) -> None:
        """Store a part's outputs."""
        if self._outputs is None:
            self._outputs = _allocate((*self._shape, part.outputs.shape[-1]))
        self._outputs[part.rows, part.columns] = np.asarray(part.outputs, np.float32)

    def logits(self, part: Part) -> jax.Array:
        """Return the reference's logits for the tokens of a part."""
        assert self._outputs is not None
        return self._model.logits(jnp.asarray(self._outputs[part.rows, part.columns]))


def predict(
    model: Model,
    stream: Stream,
    tokens: np.ndarray,  # [sequences, context + 1] int32
    settings: Settings,
    reference: Reference | None,
    advance: Advance,
) -> tuple[Predictions[np.ndarray], Timing, Reference]:
    """Predict all tokens and compare them with the reference's predictions.

    Without a reference, they are compared with themselves and returned as the reference.
    """
    inputs, truth = tokens[:, :-1], tokens[:, 1:]
    is_reference = reference is None
    if reference is None:
        reference = Reference(model, inputs.shape)
    arrays = {name: np.empty(truth.shape) for name in Predictions._fields}  # float64
    timing = Timing()
    for part in teacher_forced(model, stream, inputs, settings):
        if is_reference:
            reference.add(part)
            expected = part.logits
        else:
            expected = reference.logits(part)
        index = part.rows, part.columns
        compared = compare(expected, part.logits, truth[index])
        for name, values in compared._asdict().items():
            arrays[name][index] = values
        timing.add(part)
        advance(truth[index].size)
    return Predictions(**arrays), timing, reference


def teacher_forced(
    model: Model,
    stream: Stream,
    tokens: np.ndarray,  # [sequences, context] int32
    settings: Settings,
) -> Iterator[Part]:
    """Yield predictions for all tokens, batch by batch.

    Each sequence is prefilled in chunks, then all sequences of a batch decode their last tokens together.
    Every key and value is written to the cache and read back before it is used.
    """
    for first in range(0, len(tokens), settings.batch):
        batch = tokens[first : first + settings.batch]
        stream.begin(len(batch))
        yield from _prefill(model, stream, batch[:, : settings.prefilled], first)
        rows = slice(first, first + len(batch))
        for index in range(settings.prefilled, settings.context):
            start = time.perf_counter()
            outputs = stream.decode(batch[:, index], index)[:, None]
            yield _part(model, rows, slice(index, index + 1), outputs, start, decoded=True)


def _prefill(model: Model, stream: Stream, batch: np.ndarray, first: int) -> Iterator[Part]:
    """Yield the predictions of a batch whose first sequence is row ``first`` of all."""
    start = time.perf_counter()
    for chunk in stream.prefill(batch):
        rows = slice(first + chunk.rows.start, first + chunk.rows.stop)
        yield _part(model, rows, chunk.columns, chunk.outputs, start, decoded=False)
        start = time.perf_counter()


def _part(model: Model, rows: slice, columns: slice, outputs: jax.Array, start: float, decoded: bool) -> Part:
    logits = jax.block_until_ready(model.logits(outputs))
    return Part(rows, columns, outputs, logits, time.perf_counter() - start, decoded)


def _allocate(shape: tuple[int, ...]) -> np.ndarray:
    """Return an uninitialized float32 array, in a temporary file if it is large."""
    if 4 * math.prod(shape) < MAX_IN_MEMORY:
        return np.empty(shape, np.float32)
    return np.memmap(tempfile.TemporaryFile(), np.float32, "w+", shape=shape)


def _median(seconds: list[float]) -> float | None:
    if not seconds:
        return None
    return statistics.median(seconds)
