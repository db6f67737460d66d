"""The tokens of a step, and which sequence each is of."""

from typing import NamedTuple, Self

import jax
import jax.numpy as jnp


class Members(NamedTuple):
    """Which tokens of a ragged batch are of which sequence.

    Attributes:
        first: (sequences,) int32, the first token of each sequence.
        length: (sequences,) int32, the number of its tokens.
        sequence: (tokens,) int32, the sequence of each token; any where ``is_member`` is False.
        offset: (tokens,) int32, the token's place within its sequence.
        is_member: (tokens,) bool, False for tokens past the last sequence.
    """

    first: jax.Array
    length: jax.Array
    sequence: jax.Array
    offset: jax.Array
    is_member: jax.Array

    @classmethod
    def of(cls, starts: jax.Array, tokens: int) -> Self:
        """Return the members of a batch of so many tokens, which ``starts`` divides among its sequences."""
        starts = jnp.clip(starts, 0, tokens)
        first, end = starts[:-1], starts[1:]
        token = jnp.arange(tokens, dtype=jnp.int32)
        sequence = (token[:, None] >= end).sum(axis=1, dtype=jnp.int32)
        is_member = (sequence < len(first)) & (token >= first[:1])
        sequence = jnp.minimum(sequence, len(first) - 1)
        return cls(first, jnp.maximum(end - first, 0), sequence, token - first[sequence], is_member)


class StepTokens(NamedTuple):
    """The tokens of a step that are of one kind: a prefill's, a decode's, or a ragged batch.

    Attributes:
        position: (tokens,) int32; negative for padding and inactive tokens.
        table: (sequences, pages) int32, the page table of each sequence.
        starts: (sequences + 1,) int32, the first token of each sequence, and one past the last token. None if
            all tokens are of one sequence, or each of its own, in order.
    """

    position: jax.Array
    table: jax.Array
    starts: jax.Array | None = None

    @property
    def is_decode(self) -> bool:
        """True if each token is of a sequence of its own, in order."""
        return self.starts is None and len(self.table) == len(self.position)
