"""Numbers that are hidden in long texts and asked for at the end: what is found through the cache.

A text has sentences with numbers, at depths from its beginning to its end. Then all of them begin once more,
in another order. A number is found if each of its tokens is the likeliest, given the right ones before.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, TypedDict

import jax.numpy as jnp
import numpy as np

from qpaged._bad_argument import BadArgumentError
from qpaged.models import Tokenizer
from qpaged.sweep.measure._model import Model, Stream
from qpaged.sweep.measure._settings import Settings
from qpaged.sweep.measure._statistics import jackknife
from qpaged.sweep.measure._text import Text

STEMS = (
    "The garden gate opens with the code",
    "The harbor master answers calls to",
    "The library keeps the old map under",
    "The market hall was built for a sum of",
    "The station clock bears the serial number",
)
"""What stands before the number at each depth: 0, 25, 50, 75 and 100 % of the text. No two are alike."""

TEXTS = 4
"""Of each length."""

PART = 64
"""Outputs of which logits are computed at once."""


class NeedleScore(TypedDict):
    """What a format finds in texts of one length.

    Attributes:
        length: tokens of each text.
        found: the share of the numbers that are found.
        found_se: its standard error, over texts.
        by_depth: that share at each depth, from the text's beginning to its end.
        found_by_text: numbers found in each text.
    """

    length: int
    found: float
    found_se: float | None
    by_depth: list[float]
    found_by_text: list[int]


@dataclass(frozen=True)
class Needles:
    """Texts of one length with hidden numbers.

    Attributes:
        tokens: [texts, length + 1] int32; the last of each is predicted, never fed.
        depth: [texts, length] int8; of which number, by its depth, the next token is a part: -1 of none.
    """

    tokens: np.ndarray
    depth: np.ndarray

    @property
    def length(self) -> int:
        return self.depth.shape[1]


class _Piece(NamedTuple):
    """Some tokens, and which of them are a number, by its depth: -1 for others; both [n] int32."""

    tokens: np.ndarray
    depth: np.ndarray


def hide(text: Text, tokenizer: Tokenizer, length: int) -> Needles:
    """Hide numbers in :data:`TEXTS` parts of a text, evenly spread over it.

    Raises:
        BadArgumentError: a length of which the numbers would take more than half, or a text that is shorter.
    """
    encoded = tokenizer.encode(text.data).ids
    texts = [_hide(encoded, tokenizer, length, number) for number in range(TEXTS)]
    tokens, depth = (np.stack(parts) for parts in zip(*texts, strict=True))
    return Needles(tokens, depth[:, 1:].astype(np.int8))


def _hide(encoded: np.ndarray, tokenizer: Tokenizer, length: int, number: int) -> _Piece:
    generator = np.random.default_rng([length, number])
    keys = [f" {key}" for key in generator.integers(10_000, 100_000, len(STEMS))]
    statements = [_plain(tokenizer, f"\n{stem}{key}.\n") for stem, key in zip(STEMS, keys, strict=True)]
    questions = [_asked(tokenizer, depth, keys[depth]) for depth in generator.permutation(len(STEMS))]
    prefix = _Piece(np.asarray(tokenizer.prefix, np.int32), np.full(len(tokenizer.prefix), -1))
    taken = sum(len(piece.tokens) for piece in (prefix, *statements, *questions))
    room = length + 1 - taken
    if room < taken:
        raise BadArgumentError(
            "needles",
            f"must be lengths of at least {2 * taken - 1:,} tokens for {tokenizer.name}, but has {length:,}.",
        )
    if len(encoded) < room:
        raise BadArgumentError(
            "needles",
            f"must be lengths that the text has, but {length:,} takes {room:,} of {len(encoded):,} tokens; "
            f"give a longer text, or smaller lengths.",
        )
    start = (len(encoded) - room) * number // max(TEXTS - 1, 1)
    hay = _Piece(encoded[start : start + room], np.full(room, -1))
    ends = [room * depth // (len(STEMS) - 1) for depth in range(len(STEMS))]
    pieces, before = [prefix], 0
    for end, statement in zip(ends, statements, strict=True):
        pieces += [_Piece(*(part[before:end] for part in hay)), statement]
        before = end
    joined = zip(*pieces, *questions, strict=True)
    return _Piece(*(np.concatenate(parts).astype(np.int32) for parts in joined))


def _plain(tokenizer: Tokenizer, text: str) -> _Piece:
    ids = tokenizer.encode(text.encode()).ids
    return _Piece(ids, np.full(len(ids), -1))


def _asked(tokenizer: Tokenizer, depth: int, key: str) -> _Piece:
    """Return a question and its answer, whose tokens are marked."""
    question = f"\n{STEMS[depth]}"
    before, ids = (tokenizer.encode(text.encode()).ids for text in (question, question + key))
    return _Piece(ids, np.where(np.arange(len(ids)) < len(before), -1, depth))


def find(
    model: Model,
    stream: Stream,
    needles: Needles,
    settings: Settings,
    advance: Callable[[int], None],
) -> NeedleScore:
    """Return what is found through a stream of the model, which holds texts of this length.

    Args:
        settings: of the stream; a batch of texts is fed at once.
        advance: called with the number of tokens that were fed since the last call.
    """
    inputs, truth = needles.tokens[:, :-1], needles.tokens[:, 1:]
    is_found = np.ones((len(inputs), len(STEMS)), bool)
    for first in range(0, len(inputs), settings.batch):
        batch = inputs[first : first + settings.batch]
        stream.begin(len(batch))
        for part in stream.prefill(batch):
            index = slice(first + part.rows.start, first + part.rows.stop), part.columns
            row, column = np.nonzero(needles.depth[index] >= 0)
            if len(row):
                likeliest = _likeliest(model, np.asarray(part.outputs)[row, column])
                is_right = likeliest == truth[index][row, column]
                np.logical_and.at(
                    is_found, (index[0].start + row, needles.depth[index][row, column]), is_right
                )
            advance(truth[index].size)
    by_text = is_found.sum(axis=1)
    sums = np.stack([by_text, np.full(len(by_text), len(STEMS))], axis=1).astype(np.float64)
    found, error = jackknife(sums, lambda total: total[0] / total[1])
    assert found is not None  # numbers were hidden
    return {
        "length": needles.length,
        "found": found,
        "found_se": error,
        "by_depth": is_found.mean(axis=0).tolist(),
        "found_by_text": by_text.tolist(),
    }


def _likeliest(model: Model, outputs: np.ndarray) -> np.ndarray:
    """Return the likeliest token after each of some outputs [n, features], computed in parts of one size."""
    padded = np.pad(outputs, ((0, -len(outputs) % PART), (0, 0)))
    parts = [
        np.asarray(model.logits(jnp.asarray(padded[start : start + PART])).argmax(axis=-1))
        for start in range(0, len(padded), PART)
    ]
    return np.concatenate(parts)[: len(outputs)]
