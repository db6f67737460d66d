"""Reads the text that a sweep measures on, and cuts it into sequences of tokens."""

import hashlib
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from qpaged.models import Tokenizer, standard_library_text
from qpaged.sweep.measure._settings import Settings


@dataclass(frozen=True)
class Text:
    """The bytes of a text, and a name for where they came from."""

    source: str
    data: bytes

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()


@dataclass(frozen=True)
class Sequences:
    """Tokens that are fed to the model, and the tokens that it is to predict.

    Attributes:
        tokens: [sequences, context + 1] int32; the last token of each is predicted, never fed.
        bytes: [sequences, context], the bytes of text that each predicted token stands for.
    """

    tokens: np.ndarray
    bytes: np.ndarray

    def split(self, every: int) -> tuple["Sequences", "Sequences"]:
        """Return one sequence in ``every`` (at least one), and the other sequences."""
        chosen = np.arange(len(self.tokens)) % every == 0
        first = Sequences(self.tokens[chosen], self.bytes[chosen])
        rest = Sequences(self.tokens[~chosen], self.bytes[~chosen])
        return first, rest


def cut(text: Text, tokenizer: Tokenizer, settings: Settings) -> Sequences:
    """Cut a text into as many sequences as the settings ask for, or as there are.

    Each sequence starts with the tokenizer's prefix (such as BOS). Without a prefix, a sequence overlaps the
    one before it by one token, so that every token of the text is predicted once.

    Raises:
        ValueError: the text is shorter than one sequence, or the tokenizer cannot encode it.
    """
    context = settings.context
    encoded = tokenizer.encode(text.data)
    prefix = np.asarray(tokenizer.prefix, np.int32)
    length = context + 1 - len(prefix)  # tokens of the text in one sequence
    step = length if len(prefix) else context
    available = (len(encoded.ids) - length) // step + 1
    if available < 1:
        unit = "bytes" if tokenizer.name == "bytes" else "tokens"
        raise ValueError(
            f"{text.source} holds {len(encoded.ids):,} {unit}, but a sequence of {context:,} needs "
            f"{length:,}; give a longer text, or a smaller context."
        )
    count = min(settings.tokens // context, available)
    starts = _choose_sequences(available, count, settings.seed) * step
    index = starts[:, None] + np.arange(length)  # [sequences, length]
    widths = np.diff(encoded.ends, prepend=0)[index]
    prefixes = np.broadcast_to(prefix, (len(starts), len(prefix)))
    tokens = np.concatenate([prefixes, encoded.ids[index]], axis=1)
    widths = np.concatenate([np.zeros_like(prefixes, widths.dtype), widths], axis=1)
    return Sequences(tokens.astype(np.int32), widths[:, 1:])


def load_text(path: str | Path | None = None) -> Text:
    """Read a file; without a path, return held-out files of the running Python's standard library.

    Raises:
        OSError: the file cannot be read.
    """
    if path is not None:
        return Text(str(path), Path(path).read_bytes())
    version = ".".join(str(part) for part in sys.version_info[:3])
    return Text(f"Python {version} standard library, held-out files", standard_library_text("held_out"))


def _choose_sequences(available: int, count: int, seed: int | None) -> np.ndarray:
    """Return the ascending indices of ``count`` sequences: evenly spread, or drawn with a seed."""
    if seed is None:
        return np.arange(count) * available // count
    return np.sort(np.random.default_rng(seed).choice(available, count, replace=False))
