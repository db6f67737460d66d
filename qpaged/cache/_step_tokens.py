"""The tokens of a step, and which sequence each is of."""

from typing import NamedTuple, Self

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec


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
            all tokens are of one sequence, or each of its own, in order. (groups, sequences + 1) where
            sequences are divided over devices, each line counting within its group.
        group: () int32, the group of the one sequence of a prefill; None for other steps.
    """

    position: jax.Array
    table: jax.Array
    starts: jax.Array | None = None
    group: jax.Array | None = None

    @property
    def is_prefill(self) -> bool:
        """True if all tokens are of one sequence."""
        return self.group is not None

    def specs(self, groups: tuple[str, ...] | None) -> "StepTokens":
        """Return how the arrays are divided over the mesh axes of groups: a prefill is whole everywhere."""
        axes = None if self.is_prefill else groups
        starts = None if self.starts is None else PartitionSpec(*[axes] * bool(axes))
        group = None if self.group is None else PartitionSpec()
        return StepTokens(PartitionSpec(axes), PartitionSpec(axes), starts, group)  # type: ignore[arg-type]

    def divided(self, groups: int) -> "StepTokens":
        """Return the tokens as so many groups have them, or raise ValueError if they are of other groups."""
        lines = 1 if self.starts is None or self.starts.ndim == 1 else len(self.starts)
        if self.starts is not None and lines != groups:
            raise ValueError(
                f"ragged_starts must have a line for each of the {groups} groups of devices, but has "
                f"{lines}; see PagedAttentionMetadata.ragged."
            )
        if not self.is_prefill and len(self.position) % groups:
            raise ValueError(
                f"decodes_position must have as many rows for each of the {groups} groups of devices, but "
                f"has {len(self.position)}; fill them up with positions of -1."
            )
        if groups > 1:
            return self
        starts = None if self.starts is None else self.starts.reshape(-1)
        position = self.position
        if self.group is not None:
            position = jnp.where(self.group == 0, position, -1)
        return self._replace(position=position, starts=starts)

    def of_group(self, index: jax.Array | None) -> "StepTokens":
        """Return the tokens of a device's group, once they are divided: none of another group's prefill.

        Without an index there is one group.
        """
        position, starts = self.position, self.starts
        if self.group is not None and index is not None:
            position = jnp.where(self.group == index, position, -1)
        if starts is not None and starts.ndim == 2:
            starts = starts[0]
        return StepTokens(position, self.table, starts, self.group)

    @property
    def is_decode(self) -> bool:
        """True if each token is of a sequence of its own, in order."""
        return self.starts is None and self.group is None
