"""Text as tokens, with the byte at which each one ends."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from qpaged.models._extras import need

BYTES = "bytes"
TOKENIZER_FILE = "tokenizer.json"
PIECE = 65_536
"""Characters that are encoded at once, so that memory is bounded."""

OVERLAP = 2_048
"""Characters that a piece and the next one share, in which the one is left for the other."""


@dataclass(frozen=True)
class Tokens:
    """A text in tokens.

    Attributes:
        ids: (n,) int32.
        ends: (n,) int64; the byte of the text at which each token ends, never falling, the last at the text's
            end. Of tokens that share a character, all end where it does.
    """

    ids: np.ndarray
    ends: np.ndarray


class Tokenizer(Protocol):
    """Text to tokens and back."""

    @property
    def name(self) -> str:
        """The directory's name, or "bytes"."""

    @property
    def sha256(self) -> str | None:
        """Of the tokenizer's file; None for bytes."""

    @property
    def vocab_size(self) -> int:
        """All ids of a text and of the prefix are below it."""

    @property
    def prefix(self) -> tuple[int, ...]:
        """Ids that the model expects before a text, as a token for its beginning."""

    def encode(self, data: bytes) -> Tokens:
        """The text alone, without the prefix; what reads like a special token is text.

        Raises:
            ValueError: the tokenizer needs UTF-8, and the text is not.
        """

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of ids; what is not UTF-8 is replaced."""


@dataclass(frozen=True)
class ByteTokenizer:
    """Every byte is a token of its own."""

    name: str = BYTES
    sha256: None = None
    vocab_size: int = 256
    prefix: tuple[int, ...] = ()

    def encode(self, data: bytes) -> Tokens:
        ids = np.frombuffer(data, np.uint8).astype(np.int32)
        return Tokens(ids, np.arange(1, len(ids) + 1, dtype=np.int64))

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return bytes(map(int, ids)).decode(errors="replace")


@dataclass(frozen=True)
class FileTokenizer:
    """A `tokenizer.json`, run by the tokenizers library."""

    name: str
    sha256: str
    vocab_size: int
    prefix: tuple[int, ...]
    library: Any

    def encode(self, data: bytes) -> Tokens:
        text, ids, ends = _utf8(data), [np.empty(0, np.int32)], [np.empty(0, np.int64)]
        chars = done = 0
        for part in self._parts(text):
            ids.append(part.ids)
            offsets = np.concatenate([[0], np.cumsum(_byte_lengths(text[chars : part.ends[-1]]))])
            ends.append(done + offsets[np.maximum(part.ends - chars, 0)])
            chars, done = part.ends[-1], done + offsets[-1]
        every_end = np.concatenate(ends)
        np.maximum.accumulate(every_end, out=every_end)
        every_end[-1:] = len(data)  # the last one's, if the tokenizer drops what follows it
        return Tokens(np.concatenate(ids), every_end)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return self.library.decode([int(one) for one in ids], skip_special_tokens=False)

    def _parts(self, text: str) -> Iterator["_Spans"]:
        """The tokens of a text in parts, as if it were encoded at once.

        Each piece but the last is followed up to a token in the middle of what it shares with the next one,
        which both of them have; they are as one from there, as a token depends on the text nearby.
        """
        left, skipped, size = self._spans(text, 0, PIECE), 0, PIECE
        while left.stop < len(text):
            right = self._spans(text, left.stop - OVERLAP, PIECE)
            joint = _joint(left, right)
            if joint is None:  # as within a long run of one character, whose tokens start where it does
                size *= 2
                left = self._spans(text, left.start, size)
                continue
            yield left.part(skipped, joint[0])
            left, skipped, size = right, joint[1], PIECE
        if len(left.ids) > skipped:
            yield left.part(skipped, len(left.ids))

    def _spans(self, text: str, start: int, size: int) -> "_Spans":
        stop = min(start + size, len(text))
        encoding = self.library.encode(text[start:stop], add_special_tokens=False)
        spans = start + np.array(encoding.offsets, np.int64).reshape(-1, 2)
        return _Spans(start, stop, np.array(encoding.ids, np.int32), spans[:, 0], spans[:, 1])


@dataclass(frozen=True)
class _Spans:
    """The tokens of text[start:stop], and the characters from which and to which each one goes."""

    start: int
    stop: int
    ids: np.ndarray
    begins: np.ndarray
    ends: np.ndarray

    def part(self, first: int, last: int) -> "_Spans":
        chosen = slice(first, last)
        return _Spans(self.start, self.stop, self.ids[chosen], self.begins[chosen], self.ends[chosen])

    def within(self, start: int, stop: int) -> dict[tuple[int, int, int], int]:
        """Index of the tokens between two characters that share none with the next one."""
        first, last = np.searchsorted(self.ends, [start, stop])
        return {
            (int(self.begins[i]), int(self.ends[i]), int(self.ids[i])): i
            for i in range(first, min(last, len(self.ids) - 1))
            if self.begins[i + 1] >= self.ends[i]
        }


def _joint(left: _Spans, right: _Spans) -> tuple[int, int] | None:
    """How many tokens of each there are up to the one that both have nearest to the middle of the overlap."""
    middle = (right.start + left.stop) / 2
    ours, theirs = left.within(right.start, left.stop), right.within(right.start, left.stop)
    shared = min(ours.keys() & theirs.keys(), key=lambda token: abs(token[1] - middle), default=None)
    return None if shared is None else (ours[shared] + 1, theirs[shared] + 1)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a directory's `tokenizer.json`; bytes as tokens for "bytes".

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is malformed.
        ImportError: the tokenizers library is missing.
    """
    if path == BYTES:
        return ByteTokenizer()
    file = Path(path) / TOKENIZER_FILE if Path(path).suffix != ".json" else Path(path)
    if not file.is_file():
        raise FileNotFoundError(
            f"There is no {file}. Give a directory with one, which save_pretrained of transformers' "
            f'AutoTokenizer writes, or "{BYTES}" for a model of bytes.'
        )
    library = _open(file)
    prefix = _prefix(library)
    library.post_processor = None  # it would add the prefix, and take spaces out of what tokens span
    library.encode_special_tokens = True  # as text
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    return FileTokenizer(file.resolve().parent.name, digest, _vocab_size(library, prefix), prefix, library)


def _open(file: Path) -> Any:
    tokenizers = need("tokenizers")
    try:
        library = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"{file} is not a tokenizer ({error}). Copy the file again.") from error
    library.no_truncation()
    library.no_padding()
    return library


def _prefix(library: Any) -> tuple[int, ...]:
    """The special tokens before a text; there may be others after it."""
    encoding = library.encode("a")
    special = encoding.special_tokens_mask
    return tuple(encoding.ids[: special.index(0) if 0 in special else 0])


def _vocab_size(library: Any, prefix: tuple[int, ...]) -> int:
    """One past the largest id that a text can have: models have no room for some special tokens (Gemma 3)."""
    added = library.get_added_tokens_decoder().items()
    plain = library.get_vocab(with_added_tokens=False).values()
    return 1 + max([-1, *plain, *prefix, *(id for id, token in added if not token.special)])


def _utf8(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"the text must be UTF-8 for this tokenizer, but is not at byte {error.start:,} "
            f"({data[error.start]:#04x}); convert it, or take every byte as a token with --tokenizer {BYTES}."
        ) from error


def _byte_lengths(text: str) -> np.ndarray:
    """Bytes of each character in UTF-8."""
    points = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    return 1 + (points >= 0x80).astype(np.int64) + (points >= 0x800) + (points >= 0x10000)
