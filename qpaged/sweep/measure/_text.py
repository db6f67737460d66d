"""The text that is measured on, cut into sequences of tokens."""

import hashlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qpaged.models import standard_library_text
from qpaged.sweep._settings import Settings


@dataclass(frozen=True)
class Text:
    """Bytes, and where they came from."""

    source: str
    data: bytes

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()


@dataclass(frozen=True)
class Sequences:
    """What is fed to the model, and what it is to predict.

    Attributes:
        tokens: (sequences, context + 1) int32; the last token of each is predicted, never fed.
        bytes: (sequences, context): bytes of the text that each predicted token stands for.
    """

    tokens: np.ndarray
    bytes: np.ndarray

    def split(self, every: int) -> tuple["Sequences", "Sequences"]:
        """One sequence in ``every``, at least one, and the others."""
        taken = np.arange(len(self.tokens)) % every == 0
        return Sequences(self.tokens[taken], self.bytes[taken]), Sequences(
            self.tokens[~taken], self.bytes[~taken]
        )


def cut(text: Text, tokenizer: Any, settings: Settings) -> Sequences:
    """Sequences of a text: as many as the settings ask for, or as there are.

    They start as the tokenizer has texts start (with BOS, where it has one); without that, each overlaps the
    one before by the token that it is fed first.

    Args:
        tokenizer: as :func:`qpaged.models.load_tokenizer` gives it.

    Raises:
        ValueError: the text is shorter than one sequence, or no text of the tokenizer.
    """
    context, encoded = settings.context, tokenizer.encode(text.data)
    prefix = np.asarray(tokenizer.prefix, np.int32)
    taken = context + 1 - len(prefix)  # tokens of the text in a sequence
    step = taken if len(prefix) else context
    there = (len(encoded.ids) - taken) // step + 1
    if there < 1:
        unit = "bytes" if tokenizer.name == "bytes" else "tokens"
        raise ValueError(
            f"{text.source} holds {len(encoded.ids):,} {unit}, but a sequence of {context:,} needs "
            f"{taken:,}; give a longer text, or a smaller context."
        )
    starts = _chosen(there, min(settings.tokens // context, there), settings.seed) * step
    index = starts[:, None] + np.arange(taken)
    widths = np.diff(encoded.ends, prepend=0)[index]
    tokens = np.concatenate([np.broadcast_to(prefix, (len(starts), len(prefix))), encoded.ids[index]], axis=1)
    widths = np.concatenate([np.zeros((len(starts), len(prefix)), widths.dtype), widths], axis=1)
    return Sequences(tokens.astype(np.int32), widths[:, 1:])


def load_text(path: str | Path | None = None) -> Text:
    """A file's bytes; without one, the held-out part of the running Python's standard library.

    Raises:
        OSError: the file cannot be read.
    """
    if path is not None:
        return Text(str(path), Path(path).read_bytes())
    version = ".".join(map(str, sys.version_info[:3]))
    return Text(f"Python {version} standard library, held-out files", standard_library_text("held_out"))


def _chosen(there: int, count: int, seed: int | None) -> np.ndarray:
    """``count`` of so many sequences, ascending."""
    if seed is None:
        return np.arange(count) * there // count
    return np.sort(np.random.default_rng(seed).choice(there, count, replace=False))
