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
from jax.typing import DTypeLike

from qpaged.sweep.measure._metrics import Predictions, compare
from qpaged.sweep.measure._model import Model, Stream
from qpaged.sweep.measure._settings import Settings

MAX_IN_MEMORY = 2**30
"""Bytes of the reference's outputs from which on they are kept in a temporary file."""

LOGITS_AT_ONCE = 2**24
"""Logits that are there at once: 64 MB of float32, and a few times as much while they are compared."""

Advance = Callable[[int], None]
"""advance(tokens) is called with the number of tokens that were predicted since the last call."""


class Part(NamedTuple):
    """Predictions of some rows and columns of the tokens.

    Attributes:
        outputs: the model's outputs, from which logits are computed.
        seconds: wall-clock time, from the tokens to the outputs.
        decoded: True for one step of a decode, False for a chunk of a prefill.
    """

    rows: slice
    columns: slice
    outputs: jax.Array  # [rows, columns, features]
    seconds: float
    decoded: bool


@dataclass
class Timing:
    """Seconds of each decode step, and of each prefilled token.

    Of decode steps, which are alike, the fastest is reported, since other programs may be compiled beside
    some of them; of prefills, whose chunks are not, the median.
    """

    prefill: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)

    def add(self, part: Part, logits_seconds: float) -> None:
        """Note the seconds of a part, and those of its logits."""
        seconds = part.seconds + logits_seconds
        if part.decoded:
            self.decode.append(seconds)
        else:
            rows, columns, _ = part.outputs.shape
            self.prefill.append(seconds / (rows * columns))

    @property
    def per_decode_step(self) -> float | None:
        return min(self.decode, default=None)

    @property
    def per_prefilled_token(self) -> float | None:
        return statistics.median(self.prefill) if self.prefill else None


class Reference:
    """The plain cache's outputs, from which its logits are computed again part by part.

    A decoder's outputs are its last hidden states, so that logits over the whole vocabulary are never stored.
    """

    def __init__(self, shape: tuple[int, int]):
        self._shape = shape
        self._outputs: np.ndarray | None = None
        self._dtype: DTypeLike = np.float32

    def add(self, part: Part) -> None:
        """Store a part's outputs."""
        if self._outputs is None:
            self._outputs = _allocate((*self._shape, part.outputs.shape[-1]))
            self._dtype = part.outputs.dtype
        self._outputs[part.rows, part.columns] = np.asarray(part.outputs, np.float32)

    def outputs(self, part: Part) -> jax.Array:
        """Return the reference's outputs [rows, columns, features] for the tokens of a part."""
        assert self._outputs is not None
        return jnp.asarray(self._outputs[part.rows, part.columns], self._dtype)


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
        reference = Reference(inputs.shape)
    arrays = {name: np.empty(truth.shape) for name in Predictions._fields}  # float64
    timing = Timing()
    for part in teacher_forced(stream, inputs, settings):
        if is_reference:
            reference.add(part)
        index = part.rows, part.columns
        compared, seconds = _compare(model, reference.outputs(part), part.outputs, truth[index])
        for name, values in compared._asdict().items():
            arrays[name][index] = values
        timing.add(part, seconds)
        advance(truth[index].size)
    return Predictions(**arrays), timing, reference


def _compare(
    model: Model,
    reference: jax.Array,  # [rows, columns, features]
    outputs: jax.Array,  # [rows, columns, features]
    truth: np.ndarray,  # [rows, columns]
) -> tuple[Predictions[np.ndarray], float]:
    """Return the predictions [rows, columns], and the seconds that the logits of ``outputs`` took.

    Some tokens at a time, since all logits of a large vocabulary would be gigabytes.
    """
    features, tokens = outputs.shape[-1], truth.size
    size = min(tokens, max(1, LOGITS_AT_ONCE // model.vocabulary))
    outputs = outputs.astype(reference.dtype).reshape(-1, features)  # of another one in its noise
    reference = reference.reshape(-1, features)
    blocks, seconds = [], 0.0
    for start in range(0, tokens, size):
        first = min(start, tokens - size)  # The last block begins earlier, so that all have one size.
        block = slice(first, first + size)
        before = time.perf_counter()
        logits = jax.block_until_ready(model.logits(outputs[block]))
        seconds += time.perf_counter() - before
        compared = compare(model.logits(reference[block]), logits, truth.reshape(-1)[block])
        blocks.append([np.asarray(values)[start - first :] for values in compared])
    joined = (np.concatenate(parts).reshape(truth.shape) for parts in zip(*blocks, strict=True))
    return Predictions(*joined), seconds


def teacher_forced(
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
        yield from _prefill(stream, batch[:, : settings.prefilled], first)
        rows = slice(first, first + len(batch))
        for index in range(settings.prefilled, settings.context):
            start = time.perf_counter()
            outputs = jax.block_until_ready(stream.decode(batch[:, index], index)[:, None])
            seconds = time.perf_counter() - start
            yield Part(rows, slice(index, index + 1), outputs, seconds, decoded=True)


def _prefill(stream: Stream, batch: np.ndarray, first: int) -> Iterator[Part]:
    """Yield the predictions of a batch whose first sequence is row ``first`` of all."""
    start = time.perf_counter()
    for chunk in stream.prefill(batch):
        rows = slice(first + chunk.rows.start, first + chunk.rows.stop)
        outputs = jax.block_until_ready(chunk.outputs)
        yield Part(rows, chunk.columns, outputs, time.perf_counter() - start, decoded=False)
        start = time.perf_counter()


def _allocate(shape: tuple[int, ...]) -> np.ndarray:
    """Return an uninitialized float32 array, in a temporary file if it is large."""
    if 4 * math.prod(shape) < MAX_IN_MEMORY:
        return np.empty(shape, np.float32)
    return np.memmap(tempfile.TemporaryFile(), np.float32, "w+", shape=shape)
