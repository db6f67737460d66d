"""The text that is measured on, cut into sequences."""

import hashlib
import sys
from dataclasses import dataclass
from pathlib import Path

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

    def sequences(self, settings: Settings) -> np.ndarray:
        """(sequences, context + 1) int32: windows spread evenly over the text, overlapping by one token.

        The last token of each is predicted, never fed. As many as the settings ask for, or as there are.

        Raises:
            ValueError: the text is shorter than one sequence.
        """
        context, tokens = settings.context, np.frombuffer(self.data, np.uint8).astype(np.int32)
        windows = (len(tokens) - 1) // context
        if windows < 1:
            raise ValueError(
                f"{self.source} holds {len(tokens):,} bytes, but a sequence of {context:,} needs "
                f"{context + 1:,}; give a longer text, or a smaller context."
            )
        chosen = min(settings.tokens // context, windows)
        starts = np.arange(chosen) * windows // chosen * context
        return tokens[starts[:, None] + np.arange(context + 1)]


def load_text(path: str | Path | None = None) -> Text:
    """A file's bytes; without one, the held-out part of the running Python's standard library.

    Raises:
        OSError: the file cannot be read.
    """
    if path is not None:
        return Text(str(path), Path(path).read_bytes())
    version = ".".join(map(str, sys.version_info[:3]))
    return Text(f"Python {version} standard library, held-out files", standard_library_text("held_out"))
