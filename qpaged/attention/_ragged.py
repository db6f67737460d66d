"""Ragged batches: any number of queries of each sequence, divided into decode rows and runs of one length.

A sequence with one query becomes a decode row. The queries of any other are divided into runs, of about as
many queries as a sequence has on average, between :data:`LEAST_RUN` and :data:`LONGEST_RUN`. On average there
are then at most two runs for a sequence, and what fills them up is about as much again as the queries. How
many rows and runs there are follows from shapes alone. Which sequences they are of is computed, so that
batches of one shape share a compilation.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from qpaged._promotion import promoting_ranks
from qpaged.attention._merge import Partial
from qpaged.attention._new_tokens import NewPages, NewTokens, as_pages
from qpaged.attention._options import QueryTokens, Span
from qpaged.cache._config import LARGEST_INDEX
from qpaged.cache._step_tokens import Members

LEAST_RUN, LONGEST_RUN = 8, 128


class RaggedTokens(NamedTuple):
    """The queries of a batch, those of one sequence after another.

    Attributes:
        query: [tokens, q_heads, head_dim].
        position: [tokens] int32; negative for inactive tokens.
        tables: [sequences, pages] int32.
        starts: [sequences + 1] int32; the first token of each sequence, and one past the last token.
        span: of [tokens], as :class:`QueryTokens` has it.
        slopes: [q_heads] float32, likewise.
    """

    query: jax.Array
    position: jax.Array
    tables: jax.Array
    starts: jax.Array
    span: Span | None = None
    slopes: jax.Array | None = None

    def take(self, token: jax.Array, is_token: jax.Array, table: jax.Array) -> QueryTokens:
        """Return tokens [n] as queries; inactive where ``is_token`` [n] is False.

        Args:
            token: [n] int32.
            is_token: [n] bool.
            table: [runs, pages], of as many runs as divide the tokens.
        """
        return QueryTokens(
            query=self.query[token],
            position=jnp.where(is_token, self.position[token], -1),
            table=table,
            end=jnp.full(len(table), LARGEST_INDEX, jnp.int32),
            span=None if self.span is None else self.span.take(token, is_token),
            slopes=self.slopes,
        )


class Pieces(NamedTuple):
    """Pieces of one size, into which the tokens of sequences are divided; as many as there may be.

    Attributes:
        first: [sequences] int32, the first piece of each sequence.
        sequence: [pieces] int32; any for pieces that are not used.
        token: [pieces, size] int32; 0 where there is none.
        is_token: [pieces, size] bool.
    """

    first: jax.Array
    sequence: jax.Array
    token: jax.Array
    is_token: jax.Array

    @classmethod
    def of(cls, members: Members, count: jax.Array, size: int) -> "Pieces":
        """Return pieces of the first ``count`` [sequences] tokens of each sequence."""
        tokens, sequences = len(members.sequence), len(count)
        pieces = (count + size - 1) // size
        end = jnp.cumsum(pieces, dtype=jnp.int32)
        piece = jnp.arange(tokens // size + sequences, dtype=jnp.int32)
        sequence = jnp.minimum((piece[:, None] >= end).sum(axis=1, dtype=jnp.int32), sequences - 1)
        first = end - pieces
        index = (piece - first[sequence])[:, None] * size + jnp.arange(size, dtype=jnp.int32)
        is_token = index < count[sequence][:, None]
        token = jnp.where(is_token, members.first[sequence][:, None] + index, 0)
        return cls(first, sequence, token, is_token)


class Split(NamedTuple):
    """A ragged batch as decode rows and runs.

    Attributes:
        rows: one for each sequence, active where it has one query.
        runs: of the other sequences.
        members: which tokens are of which sequence.
        pieces: the runs, as pieces of sequences.
    """

    rows: QueryTokens
    runs: QueryTokens
    members: Members
    pieces: Pieces

    @property
    def token_of_row(self) -> jax.Array:
        """The token of each row, [sequences]; any where the row is inactive."""
        return jnp.minimum(self.members.first, len(self.members.sequence) - 1)

    def join(self, of_rows: Partial, of_runs: Partial) -> Partial:
        """Return the attention of the batch's tokens from that of both."""
        _, length, sequence, offset, is_member = self.members
        run_length = self.runs.run_length
        place = len(self.rows.query) + self.pieces.first[sequence] * run_length + offset
        place = jnp.where(length[sequence] == 1, sequence, place)
        out, lse = (jnp.concatenate(parts)[place] for parts in zip(of_rows, of_runs, strict=True))
        is_member = is_member[:, None]
        return Partial(jnp.where(is_member[..., None], out, 0), jnp.where(is_member, lse, -jnp.inf))

    def take(self, of_tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return something of each token [tokens, ...] for each query of the rows, and of the runs."""
        return of_tokens[self.token_of_row], of_tokens[self.pieces.token.reshape(-1)]

    def new_rows(self, new: NewTokens) -> NewTokens:
        """Return the keys and values of the rows' own tokens."""
        return NewTokens(new.key[self.token_of_row], new.value[self.token_of_row])

    def new_pages(self, new: NewTokens, position: jax.Array, page_size: int) -> NewPages:
        """Return the keys and values of the runs' sequences, each of which begins a page of its own."""
        members, sequence = self.members, self.pieces.sequence
        pages = Pieces.of(members, members.length, page_size)
        keys, values = (as_pages(rows[pages.token.reshape(-1)], page_size) for rows in new)
        width = -(-len(position) // page_size)
        table = pages.first[sequence][:, None] + jnp.arange(width, dtype=jnp.int32)
        is_right = _are_consecutive(members, position)[sequence]
        is_active = self.pieces.is_token & (position[self.pieces.token] >= 0)
        place = jnp.where(is_active, members.offset[self.pieces.token], -1)
        first = position[jnp.minimum(members.first, len(position) - 1)][sequence]
        count = members.length[sequence]
        return NewPages(keys, values, place.reshape(-1), table, jnp.maximum(first, 0), count, is_right)


@promoting_ranks
def split(tokens: RaggedTokens) -> Split:
    """Return a batch of at least one token and one sequence as decode rows and runs."""
    count, sequences = len(tokens.position), len(tokens.tables)
    members = Members.of(tokens.starts, count)
    pieces = Pieces.of(
        members, jnp.where(members.length > 1, members.length, 0), run_length(count, sequences)
    )
    token_of_row = jnp.minimum(members.first, count - 1)
    rows = tokens.take(token_of_row, members.length == 1, tokens.tables)
    runs = tokens.take(pieces.token.reshape(-1), pieces.is_token.reshape(-1), tokens.tables[pieces.sequence])
    return Split(rows, runs, members, pieces)


def run_length(tokens: int, sequences: int) -> int:
    """Return the queries of a run: a power of two near those that a sequence has on average."""
    average = -(-tokens // sequences)
    return min(LONGEST_RUN, max(LEAST_RUN, 1 << (average - 1).bit_length()))


def _are_consecutive(members: Members, position: jax.Array) -> jax.Array:
    """Return [sequences] bool, True if positions follow one another, inactive tokens last."""
    is_token = (position >= 0) & members.is_member
    sequences = len(members.first)
    active = jax.ops.segment_sum(is_token.astype(jnp.int32), members.sequence, sequences)
    expected = position[jnp.minimum(members.first, len(position) - 1)][members.sequence] + members.offset
    is_right = jnp.where(is_token, position == expected, True)
    is_right &= is_token == (members.is_member & (members.offset < active[members.sequence]))
    return jax.ops.segment_min(is_right.astype(jnp.int32), members.sequence, sequences) > 0
