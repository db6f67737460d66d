"""Measures formats of the cache on a trained model, token by token, as ``qpaged sweep`` does."""

import dataclasses
import hashlib
import json
import time
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from real_formats import format_of
from real_sources import say

import qpaged
from qpaged import CacheFormat, sweep
from qpaged.sweep.measure import PLAIN, Predictions, Reference, predict

ROOT = Path(__file__).parents[1]
CODE = (
    "quantizers",
    *(
        f"qpaged/{name}"
        for name in ("arrays", "attention", "cache", "formats", "models", "pools", "sweep/measure")
    ),
)
"""Folders of the code that a measurement depends on."""

MOST_AT_ONCE = 4
"""Sequences in the cache at once, at most."""

CONTEXTS = (1024, 8192, 32768)
"""Contexts at which the bits of a whole cache are counted."""


class Measured(NamedTuple):
    """Predictions of every token, arrays [sequences, context], and the seconds that they took."""

    predictions: Predictions[np.ndarray]
    seconds: float


class Bits(NamedTuple):
    """Bits for each value of the keys and values, scales included.

    Attributes:
        packed: of pages that are packed; of every page, in a format without exact ones.
        whole: of all that a cache for one sequence takes, by the tokens of the sequence.
    """

    packed: float
    whole: dict[int, float]


def code_version() -> str:
    """Return a hash of the code that measurements depend on."""
    digest = hashlib.sha256()
    for folder in CODE:
        for path in sorted((ROOT / folder).rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def load(checkpoint: Path | None, context: int) -> sweep.Decoder:
    """Load a checkpoint with its weights in float32, which would otherwise be widened at every use."""
    model = sweep.load_model(checkpoint, context=context)
    return dataclasses.replace(
        model, params={name: jnp.asarray(weight, jnp.float32) for name, weight in model.params.items()}
    )


def count_bits(model: sweep.Decoder, spelling: str, page_size: int) -> Bits:
    """Count the bits of caches that are made for one sequence."""
    cache_format = format_of(spelling)

    def bits(context: int) -> int:
        settings = sweep.Settings(tokens=context, context=context, page_size=page_size)
        cache: qpaged.PagedAttentionCache = jax.eval_shape(lambda: model.cache(cache_format, settings, 1))
        return 8 * cache.nbytes  # of shapes alone: nothing is allocated

    counted = {context: bits(context) for context in CONTEXTS}
    *_, short, long = CONTEXTS  # the exact pages of both are as many, and cancel
    packed = (counted[long] - counted[short]) / (long - short) / model.elements_per_token
    return Bits(packed, {n: total / n / model.elements_per_token for n, total in counted.items()})


class Measurer:
    """A model and a text; the plain float32 cache's predictions, the reference, are computed when needed.

    Args:
        settings: how many tokens, in sequences and pages of which size.
        folder: where the predictions of every token are kept; nothing there is measured again.
        again: measure again what the folder has.
    """

    def __init__(
        self,
        model: sweep.Decoder,
        text: sweep.Text,
        settings: sweep.Settings,
        folder: Path,
        again: bool = False,
    ):
        self.model, self.text, self.settings = model, text, settings
        self.tokens = sweep.Sweep(model, text, (), settings).sequences.tokens
        self._folder, self._again = folder, again
        self._reference: Reference | None = None

    @cached_property
    def conditions(self) -> dict[str, str | int]:
        """What all measurements depend on, besides the format."""
        return {
            "model_sha256": self.model.sha256,
            "text_sha256": self.text.sha256,
            "context": self.settings.context,
            "sequences": len(self.tokens),
            "page_size": self.settings.page_size,
            "code": code_version(),
        }

    def measure(self, spelling: str) -> Measured:
        """Measure a format, or read what was measured before under the same conditions."""
        path = self._path(spelling)
        if path.exists() and not self._again:
            return read(path)
        cache_format = format_of(spelling)
        if self._reference is None:
            plain = self._predict("plain", PLAIN)
            write(self._path("plain"), plain)
            if cache_format == PLAIN:
                return plain
        measured = self._predict(spelling, cache_format)
        write(path, measured)
        return measured

    def _predict(self, spelling: str, cache_format: CacheFormat) -> Measured:
        """Predict every token; the first predictions become the reference."""
        start = time.perf_counter()
        say(f"{self.model.name}: {spelling}, {self.tokens.shape[0]} x {self.settings.context:,} tokens")
        at_once = min(len(self.tokens), self.settings.batch)
        stream = self.model.stream(cache_format, self.settings, at_once)
        predictions, _, self._reference = predict(
            self.model, stream, self.tokens, self.settings, self._reference, lambda tokens: None
        )
        if not np.isfinite(predictions.kl).all():
            raise FloatingPointError(f"{spelling} gives {self.model.name} logits that are not finite")
        return Measured(predictions, time.perf_counter() - start)

    def _path(self, spelling: str) -> Path:
        """Return the file of a format's predictions under these conditions."""
        identity = json.dumps([self.conditions, format_of(spelling).config], sort_keys=True)
        return self._folder / f"{hashlib.sha256(identity.encode()).hexdigest()[:16]}.npz"


def settings_for(context: int, sequences: int, page_size: int) -> sweep.Settings:
    """Return the settings of a sweep over so many sequences."""
    batch = min(sequences, MOST_AT_ONCE)
    return sweep.Settings(tokens=context * sequences, context=context, page_size=page_size, batch=batch)


def write(path: Path, measured: Measured) -> None:
    """Write predictions in one step, so that an interrupt leaves no half of a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial.npz")
    arrays = {name: np.float32(array) for name, array in measured.predictions._asdict().items()}
    np.savez(partial, seconds=measured.seconds, **arrays)
    partial.replace(path)


def read(path: Path) -> Measured:
    """Return the predictions that :func:`write` wrote."""
    with np.load(path) as file:
        arrays = {name: np.float64(file[name]) for name in Predictions._fields}
        return Measured(Predictions(**arrays), float(file["seconds"]))
