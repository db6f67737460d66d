"""The sweep: the reference, then every format."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

from qpaged.quantizer import CacheFormat
from qpaged.sweep._attention_error import attention_error, plain_probes
from qpaged.sweep._metrics import Accuracy, measure_accuracy
from qpaged.sweep._model import Model
from qpaged.sweep._settings import Settings
from qpaged.sweep._stream import cached_forward, make_cache
from qpaged.sweep._text import Text

PLAIN = CacheFormat()
BF16_BYTES = 2

Report = Callable[[str, int], None]
"""report(format, tokens): so many more tokens of this format are done."""


@dataclass(frozen=True)
class Run:
    """One format, measured.

    Attributes:
        format: as it was asked for.
        key, value: the canonical spellings of its parts.
        dtype: the logical dtype of its cache.
        bytes_per_token: of the allocated cache, keys and values of all layers, scales included.
        ratio: bytes of the same cache in bfloat16 over these.
        bits_per_element: likewise, over the elements of keys and values.
        accuracy: its predictions beside the reference's.
        attention_error: relative error of each layer's attention by itself.
        tokens: predicted tokens.
        seconds: wall-clock, compilation included.
    """

    format: str
    key: str
    value: str
    dtype: str
    bytes_per_token: float
    ratio: float
    bits_per_element: float
    accuracy: Accuracy
    attention_error: tuple[float, ...]
    tokens: int
    seconds: float

    @property
    def worst_attention_error(self) -> float:
        return max(self.attention_error)


@dataclass(frozen=True)
class Failure:
    """One format that could not be measured, and why."""

    format: str
    error: str


def sweep_order(formats: Sequence[str]) -> list[tuple[str, CacheFormat]]:
    """What is run, spelling by spelling: the plain reference first, each spelling once.

    Raises:
        RegistryError: a spelling that names no installed format.
    """
    asked = {spelling: CacheFormat.of(spelling) for spelling in formats}
    plain = [(spelling, format) for spelling, format in asked.items() if format == PLAIN]
    rest = [(spelling, format) for spelling, format in asked.items() if format != PLAIN]
    return [*(plain[:1] or [("plain", PLAIN)]), *rest]


def iter_sweep(
    model: Model, text: Text, formats: Sequence[str], settings: Settings, report: Report = lambda *_: None
) -> Iterator[Run | Failure]:
    """Measure each of ``formats``, the plain float32 reference first.

    Lazy: whoever stops early keeps what came. A format that fails is yielded as a failure, and the rest
    goes on.

    Raises:
        RegistryError: a spelling that names no installed format.
        ValueError: a text shorter than one sequence, or a context longer than the model's.
    """
    _check_context(model, settings)
    order, windows = sweep_order(formats), text.sequences(settings)
    return _runs(model, windows, order, settings, report)


def _runs(model, windows: np.ndarray, order, settings: Settings, report: Report) -> Iterator[Run | Failure]:
    reference: np.ndarray | None = None
    began = time.perf_counter()
    probes = plain_probes(model, windows[:, :-1], settings)
    for spelling, format in order:
        dtype = "float32" if format == PLAIN else settings.dtype
        try:
            run, logits = _measure(model, windows, spelling, format, dtype, reference, probes, settings, report, began)
        except Exception as error:
            if reference is None:
                raise
            yield Failure(spelling, " ".join(f"{type(error).__name__}: {error}".split()))
        else:
            reference = logits if reference is None else reference
            yield run
        began = time.perf_counter()


def _measure(model, windows, spelling, format, dtype, reference, probes, settings, report, began):
    """(run, logits) of one format; it is its own reference where there is none yet."""
    tokens, truth = windows[:, :-1], windows[:, 1:]
    cache = make_cache(model, format, jnp.dtype(dtype), settings, min(settings.batch, len(tokens)))
    size = cache.nbytes / (cache.views[0].metadata.num_pages_per_layer * settings.page_size)
    logits = cached_forward(model, cache, tokens, settings, lambda count: report(spelling, count))
    accuracy = measure_accuracy(logits if reference is None else reference, logits, truth)
    errors = attention_error(model, probes, format, jnp.dtype(dtype), settings)
    parts = format.config
    elements = model.elements_per_token
    run = Run(
        spelling, parts["key"], parts["value"], dtype, size, BF16_BYTES * elements / size, 8 * size / elements,
        accuracy, tuple(errors), truth.size, time.perf_counter() - began,
    )  # fmt: skip
    return run, logits


def _check_context(model: Model, settings: Settings) -> None:
    longest = model.config.max_position_embeddings
    if settings.context > longest:
        raise ValueError(
            f"context must be at most {longest:,}, the longest that {model.name} was made for, "
            f"but came as {settings.context:,}."
        )
