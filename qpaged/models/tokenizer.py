"""Encode text as tokens, with the byte at which each one ends."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from qpaged._extras import need
from qpaged._files import read_json

if TYPE_CHECKING:
    import tokenizers

BYTES = "bytes"
TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
PIECE = 65_536
"""Characters that are encoded at once, so that memory is bounded."""

OVERLAP = 2_048
"""Characters that a piece shares with the next one, so that their tokens can be spliced there."""


@dataclass(frozen=True)
class Tokens:
    """A text in tokens.

    Attributes:
        ids: (n,) int32.
        ends: (n,) int64; the byte of the text at which each token ends, never falling, the last at the text's
            end. Tokens that share a character all end where the character does.
    """

    ids: np.ndarray
    ends: np.ndarray


class Tokenizer(Protocol):
    """Encodes text as tokens and decodes it again."""

    @property
    def name(self) -> str:
        """The directory's name, or "bytes"."""

    @property
    def sha256(self) -> str | None:
        """The SHA-256 of the tokenizer's file; None for bytes."""

    @property
    def vocab_size(self) -> int:
        """A number that all ids of a text and of the prefix are below."""

    @property
    def prefix(self) -> tuple[int, ...]:
        """Ids that the model expects before a text, as a token for its beginning."""

    def encode(self, data: bytes) -> Tokens:
        """Return the tokens of a text, without the prefix; special tokens in the text are read as plain text.

        Raises:
            ValueError: the tokenizer needs UTF-8, and the text is not.
        """

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Return the text of ids; bytes that are not UTF-8 are replaced."""


@dataclass(frozen=True)
class ByteTokenizer:
    """A tokenizer for which every byte is a token of its own."""

    name: str = BYTES
    sha256: None = None
    vocab_size: int = 256
    prefix: tuple[int, ...] = ()

    def encode(self, data: bytes) -> Tokens:
        ids = np.frombuffer(data, np.uint8).astype(np.int32)
        ends = np.arange(1, len(ids) + 1, dtype=np.int64)
        return Tokens(ids, ends)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return bytes(int(token) for token in ids).decode(errors="replace")


@dataclass(frozen=True)
class FileTokenizer:
    """A `tokenizer.json`, run by the tokenizers library."""

    name: str
    sha256: str
    vocab_size: int
    prefix: tuple[int, ...]
    library: tokenizers.Tokenizer

    def encode(self, data: bytes) -> Tokens:
        text = _decode_utf8(data)
        ids = [np.empty(0, np.int32)]
        ends = [np.empty(0, np.int64)]
        num_chars = num_bytes = 0  # of the text up to here
        for piece in self._spliced_pieces(text):
            piece_chars = text[num_chars : piece.ends[-1]]
            # The byte at which each of these characters begins, and the byte at which the last one ends.
            byte_offsets = np.concatenate([[0], np.cumsum(_utf8_lengths(piece_chars))])
            # A token without characters of its own may end where the tokens before it do.
            char_ends = np.maximum(piece.ends - num_chars, 0)
            ids.append(piece.ids)
            ends.append(num_bytes + byte_offsets[char_ends])
            num_chars += len(piece_chars)
            num_bytes += byte_offsets[-1]
        all_ends = np.concatenate(ends)
        np.maximum.accumulate(all_ends, out=all_ends)
        # A tokenizer may drop what follows the last token, as spaces; the last token is to end with the text.
        all_ends[-1:] = len(data)
        return Tokens(np.concatenate(ids), all_ends)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return self.library.decode([int(token) for token in ids], skip_special_tokens=False)

    def _spliced_pieces(self, text: str) -> Iterator[_EncodedPiece]:
        """Yield the tokens of a text piece by piece, the same as if the whole text were encoded at once.

        Each piece is encoded together with the beginning of the next one. In the middle of what they share,
        both have the same tokens, as a token depends on the text nearby; at one of these the first piece is
        left for the next.
        """
        piece = self._encode_piece(text, 0, PIECE)
        num_skipped = 0  # tokens of the piece that the piece before it has yielded
        size = PIECE
        while piece.text_stop < len(text):
            next_piece = self._encode_piece(text, piece.text_stop - OVERLAP, PIECE)
            splice = _find_splice(piece, next_piece)
            if splice is None:
                # In a long run of one character, tokens depend on where the piece starts: make it larger.
                size *= 2
                piece = self._encode_piece(text, piece.text_start, size)
                continue
            num_tokens, num_next_skipped = splice
            yield piece.tokens(num_skipped, num_tokens)
            piece = next_piece
            num_skipped = num_next_skipped
            size = PIECE
        if len(piece.ids) > num_skipped:
            yield piece.tokens(num_skipped, len(piece.ids))

    def _encode_piece(self, text: str, start: int, size: int) -> _EncodedPiece:
        stop = min(start + size, len(text))
        with _panics_as_errors(
            f"{self.name}/{TOKENIZER_FILE} cannot encode the text between characters {start:,} and {stop:,}"
        ):
            encoding = self.library.encode(text[start:stop], add_special_tokens=False)
        spans = start + np.array(encoding.offsets, np.int64).reshape(-1, 2)  # [n, 2], also for n = 0
        ids = np.array(encoding.ids, np.int32)
        return _EncodedPiece(start, stop, ids, starts=spans[:, 0], ends=spans[:, 1])


@dataclass(frozen=True)
class _EncodedPiece:
    """The tokens of text[text_start:text_stop].

    Attributes:
        ids: (n,) int32.
        starts: (n,) int64; the character of the whole text at which each token starts.
        ends: (n,) int64; the character at which it ends.
    """

    text_start: int
    text_stop: int
    ids: np.ndarray
    starts: np.ndarray
    ends: np.ndarray

    def tokens(self, first: int, stop: int) -> _EncodedPiece:
        """Return the tokens from ``first`` up to ``stop``."""
        chosen = slice(first, stop)
        return _EncodedPiece(
            self.text_start, self.text_stop, self.ids[chosen], self.starts[chosen], self.ends[chosen]
        )

    def tokens_ending_in(self, start: int, stop: int) -> dict[tuple[int, int, int], int]:
        """Return the index of each token (start, end, id) that ends within a span of characters.

        Tokens that share a character with the next one are left out: the text cannot be split behind them.
        """
        first, last = np.searchsorted(self.ends, [start, stop])
        indices = {}
        for index in range(first, min(last, len(self.ids) - 1)):
            if self.starts[index + 1] >= self.ends[index]:
                token = (int(self.starts[index]), int(self.ends[index]), int(self.ids[index]))
                indices[token] = index
        return indices


def _find_splice(piece: _EncodedPiece, next_piece: _EncodedPiece) -> tuple[int, int] | None:
    """Return how many tokens to take of a piece and how many to skip of the next; None if they share none.

    They are spliced behind the token that both have and that ends nearest to the middle of the overlap.
    """
    overlap = (next_piece.text_start, piece.text_stop)
    middle = sum(overlap) / 2
    indices = piece.tokens_ending_in(*overlap)
    next_indices = next_piece.tokens_ending_in(*overlap)
    shared = indices.keys() & next_indices.keys()
    if not shared:
        return None

    def distance_to_middle(token: tuple[int, int, int]) -> float:
        _, end, _ = token
        return abs(end - middle)

    nearest = min(shared, key=distance_to_middle)
    return indices[nearest] + 1, next_indices[nearest] + 1


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Return the tokenizer of a directory's `tokenizer.json`; one with bytes as tokens for "bytes".

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is malformed.
        ImportError: the tokenizers library is missing.
    """
    if path == BYTES:
        return ByteTokenizer()
    file = Path(path)
    if file.suffix != ".json":
        file = file / TOKENIZER_FILE
    if not file.is_file():
        raise FileNotFoundError(
            f"There is no {file}. Give a directory with one, which save_pretrained of transformers' "
            f'AutoTokenizer writes, or "{BYTES}" for a model of bytes.'
        )
    library = _open(file)
    prefix = _configured_prefix(file, library, _read_prefix(file, library))
    # The post-processor would add the prefix to every piece, and take spaces out of what tokens span.
    library.post_processor = None
    library.encode_special_tokens = True  # a text that holds "<s>" means these three characters
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    return FileTokenizer(file.resolve().parent.name, digest, _vocab_size(library, prefix), prefix, library)


def _open(file: Path) -> tokenizers.Tokenizer:
    """Return the library's tokenizer of a file, which is neither to truncate nor to pad."""
    tokenizers = need("tokenizers")
    try:
        library = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"{file} is not a tokenizer ({error}). Copy the file again.") from error
    library.no_truncation()
    library.no_padding()
    return library


@contextmanager
def _panics_as_errors(what: str) -> Iterator[None]:
    """Raise ValueError where the tokenizers library panics: its regular expressions have a limit of steps.

    Its exception for that has no public name, and is no `Exception`.
    """
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise ValueError(
            f"{what}: the tokenizers library gave up ({error}). Use the model's own tokenizer, or "
            f"take every byte as a token with --tokenizer {BYTES}."
        ) from error


def _read_prefix(file: Path, library: tokenizers.Tokenizer) -> tuple[int, ...]:
    """Return the special tokens that the tokenizer puts before a text; there may be others after it."""
    with _panics_as_errors(f'{file} cannot encode "a"'):
        encoding = library.encode("a")
    prefix: list[int] = []
    for token, is_special in zip(encoding.ids, encoding.special_tokens_mask, strict=True):
        if not is_special:
            return tuple(prefix)
        prefix.append(token)
    return ()  # nothing but special tokens: there is no text that they come before


def _configured_prefix(file: Path, library: tokenizers.Tokenizer, prefix: tuple[int, ...]) -> tuple[int, ...]:
    """Return the prefix as `add_bos_token` of the `tokenizer_config.json` beside the file has it.

    Transformers follows that flag where it stands, whatever the template in `tokenizer.json` does.
    """
    config_file = file.with_name(CONFIG_FILE)
    config = read_json(config_file) if config_file.is_file() else {}
    add_bos = config.get("add_bos_token") if isinstance(config, dict) else None
    if not isinstance(add_bos, bool):
        return prefix
    token = config.get("bos_token")
    content = token.get("content") if isinstance(token, dict) else token
    bos = library.token_to_id(content) if isinstance(content, str) else None
    if bos is None or add_bos == (bos in prefix):
        return prefix
    configured = (bos, *prefix) if add_bos else tuple(token for token in prefix if token != bos)
    warnings.warn(
        f"{file} puts {prefix} before a text, but add_bos_token of {CONFIG_FILE} says {add_bos}; it is "
        f"followed, as transformers does: {configured}.",
        stacklevel=3,
    )
    return configured


def _vocab_size(library: tokenizers.Tokenizer, prefix: tuple[int, ...]) -> int:
    """Return one more than the largest id that a text can have.

    Special tokens that no text has are left out, as models have no room for some (Gemma 3).
    """
    ids = [*prefix, *library.get_vocab(with_added_tokens=False).values()]
    for token_id, token in library.get_added_tokens_decoder().items():
        if not token.special:
            ids.append(token_id)
    largest = max(ids, default=-1)
    if largest >= np.iinfo(np.int32).max:
        raise ValueError(
            f"tokens must have ids of 32 bits, but one has {largest:,}. Copy the tokenizer again."
        )
    return 1 + largest


def _decode_utf8(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"the text must be UTF-8 for this tokenizer, but is not at byte {error.start:,} "
            f"({data[error.start]:#04x}); convert it, or take every byte as a token with --tokenizer {BYTES}."
        ) from error


def _utf8_lengths(text: str) -> np.ndarray:
    """Return the number of bytes of each character in UTF-8, int64."""
    code_points = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    lengths = np.ones(len(code_points), np.int64)
    for first_longer in (0x80, 0x800, 0x10000):
        lengths += code_points >= first_longer
    return lengths
