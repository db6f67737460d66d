"""Settings of a sweep: how much is measured, and in what pieces it goes through the cache."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from qpaged._bad_argument import BadArgumentError
from qpaged.cache._config import LARGEST_INDEX

DTYPES = ("bfloat16", "float16", "float32")
TEXTS_AT_ONCE = 4
"""Texts with hidden numbers in the cache at once, at most: they may be longer than what else is measured."""

COMPUTE_DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class Settings:
    """How much a sweep measures.

    Attributes:
        tokens: predicted tokens, at most; rounded down to whole sequences.
        context: tokens of a sequence.
        page_size: tokens of a page.
        dtype: the logical dtype of the caches that are measured; the reference is always float32.
        chunk: tokens of a prefill chunk; not a multiple of usual page sizes, so that chunks end inside pages.
        decode: tokens at each sequence's end that are decoded one by one, at most half of the sequence.
        batch: sequences in the cache at once; their pages are reset and reused for the next batch.
        probed: sequences on which each layer's attention error is measured, at most; 0 leaves it out.
        prompts: sequences whose beginning is continued greedily, at most; 0 leaves it out.
        generated: tokens of a greedy continuation, at most half of a sequence.
        seed: draws the sequences of the text; they are spread evenly over it if None.
        noise: the reference is compared with itself, too, under other conditions; see :class:`Noise`.
        bits_at: tokens of the sequences whose bytes are counted; ``context`` if None.
        needles: tokens of texts in which numbers are hidden, to be found through each format's cache.

    Raises:
        BadArgumentError: a count that is too small or too large, or another dtype.
    """

    tokens: int = 16_384
    context: int = 1024
    page_size: int = 16
    dtype: str = "bfloat16"
    chunk: int = 250
    decode: int = 32
    batch: int = 8
    probed: int = 2
    prompts: int = 8
    generated: int = 32
    seed: int | None = None
    noise: bool = True
    bits_at: int | None = None
    needles: tuple[int, ...] = ()

    @classmethod
    def of_predictions_alone(cls, **settings: Any) -> "Settings":
        """Return settings without decode, greedy texts, errors by layer and noise: most of the time."""
        return cls(**settings, decode=0, probed=0, prompts=0, noise=False)

    def __post_init__(self) -> None:
        least = {"context": 2, "decode": 0, "probed": 0, "prompts": 0, "seed": 0, "bits_at": 2}
        for name, value in vars(self).items():
            if type(value) is int and value < least.get(name, 1):
                raise BadArgumentError(name, f"must be at least {least.get(name, 1)}, but came as {value:,}.")
            if isinstance(value, int) and value > LARGEST_INDEX and name != "seed":
                raise BadArgumentError(name, f"must be at most {LARGEST_INDEX:,}, but came as {value:,}.")
        if self.tokens < self.context:
            raise BadArgumentError(
                "tokens",
                f"must be at least the context, {self.context:,}, but came as {self.tokens:,}; "
                f"give more tokens, or a smaller context.",
            )
        if self.dtype not in DTYPES:
            raise BadArgumentError(
                "dtype", f"must be one of {', '.join(DTYPES)}, but came as {self.dtype!r}."
            )

    def of_needles(self, length: int) -> "Settings":
        """Return the settings of a cache that holds texts with hidden numbers."""
        return dataclasses.replace(self, tokens=length, context=length, batch=min(self.batch, TEXTS_AT_ONCE))

    def halved(self, sequences: int) -> "Settings | None":
        """Return the settings with half the chunk and half the batch that so many sequences have.

        None if neither can be halved.
        """
        chunk, batch = min(self.chunk, self.prefilled), min(self.batch, sequences)
        if chunk == batch == 1:
            return None
        return dataclasses.replace(self, chunk=-(-chunk // 2), batch=-(-batch // 2))

    @property
    def counted(self) -> "Settings":
        """The settings of sequences as long as those whose bytes are counted."""
        length = self.context if self.bits_at is None else self.bits_at
        return dataclasses.replace(self, tokens=length, context=length)

    @property
    def decoded(self) -> int:
        """Tokens of each sequence that are decoded one by one."""
        return min(self.decode, self.context // 2)

    @property
    def prefilled(self) -> int:
        """Tokens of each sequence that are prefilled."""
        return self.context - self.decoded

    @property
    def continued(self) -> int:
        """Tokens that are generated after each prompt."""
        return min(self.generated, self.context // 2)

    @property
    def prompt(self) -> int:
        """Tokens of each prompt: one chunk, or less where a chunk leaves no room for the continuation."""
        return min(self.chunk, self.context - self.continued)

    @property
    def pages_per_sequence(self) -> int:
        """Pages that one sequence fills, the last one perhaps in part."""
        return -(-self.context // self.page_size)
