"""The sweep: the reference, then every format."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import jax.numpy as jnp
import numpy as np

from qpaged.cache import PagedAttentionCache
from qpaged.quantizer import CacheFormat
from qpaged.sweep._attention_error import Probe, attention_error, plain_probes
from qpaged.sweep._metrics import Accuracy, measure_accuracy
from qpaged.sweep._model import Model
from qpaged.sweep._settings import Settings
from qpaged.sweep._stream import cached_forward, make_cache
from qpaged.sweep._text import Text

PLAIN = CacheFormat()
REFERENCE_DTYPE = "float32"  # what models are computed in
BF16_BYTES = 2

Report = Callable[[str, int], None]
"""report(format, tokens): so many more tokens of this format are done."""


@dataclass(frozen=True)
class Run:
    """One format, measured.

    Attributes:
        format: as it was asked for.
        key: the canonical spelling of the keys' format.
        value: of the values'.
        dtype: the logical dtype of the cache.
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
        """The largest error of a layer."""
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
        longest = self.model.config.max_position_embeddings
        if self.settings.context > longest:
            raise ValueError(
                f"context must be at most {longest:,}, the longest that {self.model.name} was made for, "
                f"but came as {self.settings.context:,}."
            )
        _ = self.order, self.windows  # both raise where they cannot be had

    @cached_property
    def order(self) -> list[tuple[str, CacheFormat]]:
        """Each spelling once, with what it stands for; the reference first."""
        return sweep_order(self.formats)

    @cached_property
    def windows(self) -> np.ndarray:
        """(sequences, context + 1) int32: the tokens that are fed and predicted."""
        return self.text.sequences(self.settings)

    @property
    def tokens(self) -> int:
        """Tokens that each format predicts."""
        return len(self.windows) * self.settings.context

    def run(self, report: Report = lambda format, tokens: None) -> Iterator[Run | Failure]:
        """Measure format by format; whoever stops early keeps what came.

        A format that fails is yielded as a failure, and the others go on.
        """
        (plain, _), *rest = self.order
        cache = self._cache(PLAIN, REFERENCE_DTYPE)
        probes = plain_probes(self.model, cache, self.windows[:, :-1], self.settings)
        run, reference = self._measure(plain, PLAIN, REFERENCE_DTYPE, probes, None, report)
        yield run
        for spelling, format in rest:
            try:
                run, _ = self._measure(spelling, format, self.settings.dtype, probes, reference, report)
            except Exception as error:  # a plugin's own; the other formats are still worth having
                yield Failure(spelling, " ".join(f"{type(error).__name__}: {error}".split()))
            else:
                yield run

    def _measure(
        self,
        spelling: str,
        format: CacheFormat,
        dtype: str,
        probes: list[Probe],
        reference: np.ndarray | None,
        report: Report,
    ) -> tuple[Run, np.ndarray]:
        """The run, and its logits; they are their own reference where there is none."""
        began, model, settings = time.perf_counter(), self.model, self.settings
        tokens, truth = self.windows[:, :-1], self.windows[:, 1:]
        cache = self._cache(format, dtype)
        size = cache.nbytes / (cache.views[0].metadata.num_pages_per_layer * settings.page_size)
        logits = cached_forward(model, cache, tokens, settings, lambda count: report(spelling, count))
        accuracy = measure_accuracy(logits if reference is None else reference, logits, truth)
        errors = attention_error(self._cache(format, dtype), probes)
        run = Run(
            format=spelling,
            key=str(CacheFormat(format.key, format.key)),
            value=str(CacheFormat(format.value, format.value)),
            dtype=dtype,
            bytes_per_token=size,
            ratio=BF16_BYTES * model.elements_per_token / size,
            bits_per_element=8 * size / model.elements_per_token,
            accuracy=accuracy,
            attention_error=tuple(errors),
            tokens=truth.size,
            seconds=time.perf_counter() - began,
        )
        return run, logits

    def _cache(self, format: CacheFormat, dtype: str) -> PagedAttentionCache:
        held = min(self.settings.batch, len(self.windows))
        return make_cache(self.model, format, jnp.dtype(dtype), self.settings, held)
