"""The queries of a call, by kind, and which slots each sees."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jax.typing import ArrayLike

from qpaged import pools
from qpaged._arguments import check_type
from qpaged.attention._checks import (
    check_consecutive,
    check_query,
    checked_new,
    checked_slopes,
    checked_until,
    checked_window,
)
from qpaged.attention._merge import Partial
from qpaged.attention._new_tokens import NewPages, NewTokens
from qpaged.attention._options import QueryTokens, Span
from qpaged.attention._ragged import RaggedTokens, Split, split
from qpaged.cache import PagedAttentionCacheView, PagedAttentionMetadata
from qpaged.cache._config import LARGEST_INDEX
from qpaged.cache._metadata import check_step
from qpaged.cache._placement import Placement, num_groups
from qpaged.cache._step_tokens import StepTokens
from qpaged.cache._view import here


class Mask(NamedTuple):
    """What the queries of a call see beside, or instead of, all that is before them; checked.

    Attributes:
        window: the sliding window, where options do not have it: traced, or with ``until``; else None.
        until: [tokens] int32, the last position that each query sees, where it is beyond its own; or None.
        slopes: [q_heads] float32, or None.
        given: of [tokens], what they see in the end; or None.
    """

    window: int | jax.Array | None = None
    until: jax.Array | None = None
    slopes: jax.Array | None = None
    given: Span | None = None

    def with_window(self, window: int | None) -> "Mask":
        """Return the mask with a known window, if there is no other."""
        return self if window is None else self._replace(window=window)

    def span(self, position: jax.Array, slots: int) -> Span | None:
        """Return what tokens at these positions see of so many slots; None if options say it."""
        if self.given is not None:
            return self.given
        if self.window is None and self.until is None:
            return None
        first, last = jnp.zeros_like(position), position
        if self.window is not None:
            first = jnp.maximum(position - (jnp.maximum(self.window, 1) - 1), 0)
        if self.until is not None:
            further = jnp.maximum(position, jnp.minimum(self.until, slots - 1))
            last = jnp.where(position >= 0, further, -1)
        return Span(first, last)


def checked_mask(
    query: jax.Array,  # [tokens, q_heads, head_dim]
    sliding_window: ArrayLike | None,
    visible_until: ArrayLike | None,
    alibi_slopes: ArrayLike | None,
) -> tuple[int | None, Mask]:
    """Return the sliding window of the options, and the rest of the mask; or raise what is wrong with it."""
    window = checked_window(sliding_window)
    until = None if visible_until is None else checked_until(visible_until, len(query))
    slopes = None if alibi_slopes is None else checked_slopes(alibi_slopes, query.shape[1])
    if until is None and not isinstance(window, jax.Array):
        return window, Mask(slopes=slopes)
    return None, Mask(window, until, slopes)


class TokenGroup(NamedTuple):
    """Queries of one kind, and the keys and values of their tokens; None if the cache holds these."""

    tokens: QueryTokens | RaggedTokens
    new: NewTokens | None

    @property
    def is_empty(self) -> bool:
        """True if there is nothing to attend with, or to."""
        table = self.tokens.tables if isinstance(self.tokens, RaggedTokens) else self.tokens.table
        return not self.tokens.query.size or not table.size

    def divided(self, page_size: int) -> "DividedGroup":
        """Return the queries, of which there are some, as backends take them."""
        tokens, new = self
        if isinstance(tokens, RaggedTokens):
            batch = split(tokens)
            parts = (batch.rows, batch.runs)
            if new is None:
                return DividedGroup(parts, (None, None), batch)
            news = batch.new_rows(new), batch.new_pages(new, tokens.position, page_size)
            return DividedGroup(parts, news, batch)
        tokens = dataclasses.replace(tokens, end=jnp.asarray(tokens.end))  # which may be of NumPy
        if new is None or len(tokens.table) == len(tokens.query):
            return DividedGroup((tokens,), (new,))
        return DividedGroup((tokens,), (NewPages.of_prefill(tokens, new, page_size),))


class DividedGroup(NamedTuple):
    """The queries of a group as backends take them: all as one part, or the rows and the runs of a batch.

    Attributes:
        parts: the queries.
        new: the new tokens of each part, or None.
        batch: None if there is one part.
    """

    parts: tuple[QueryTokens, ...]
    new: tuple[NewTokens | NewPages | None, ...]
    batch: Split | None = None

    def take(self, of_tokens: jax.Array) -> tuple[jax.Array, ...]:
        """Return something of each token [tokens, ...] for each query of each part."""
        return (of_tokens,) if self.batch is None else self.batch.take(of_tokens)

    def join(self, partials: Sequence[Partial]) -> Partial:
        """Return the attention of the group's tokens from that of the parts."""
        return partials[0] if self.batch is None else self.batch.join(*partials)

    def active_position(self, position: jax.Array) -> jax.Array:
        """Return the position of each token [tokens]; negative where it is of no sequence."""
        return position if self.batch is None else jnp.where(self.batch.members.is_member, position, -1)


class StepCall(NamedTuple):
    """The attention of the tokens of a step that are of one kind: what is asked, and of which tokens.

    Attributes:
        step: the tokens.
        query: [tokens, q_heads, head_dim].
        new: keys and values of the tokens; None if the cache holds these.
        mask: what they see; ``until`` is of these tokens.
        sinks: [q_heads] float32, or None.
    """

    step: StepTokens
    query: jax.Array
    new: NewTokens | None
    mask: Mask
    sinks: jax.Array | None

    def specs(self, placement: Placement) -> "StepCall":
        """Return how the arrays are divided over devices."""
        rows, heads = placement.row_specs(self.step), PartitionSpec(placement.open_heads)
        mask = Mask(
            None if self.mask.window is None else PartitionSpec(),  # type: ignore[arg-type]
            None if self.mask.until is None else PartitionSpec(rows[0]),  # type: ignore[arg-type]
            None if self.mask.slopes is None else heads,  # type: ignore[arg-type]
        )
        new = None if self.new is None else NewTokens(rows, rows)  # type: ignore[arg-type]
        sinks = None if self.sinks is None else heads
        return StepCall(self.step.specs(placement.open_groups), rows, new, mask, sinks)  # type: ignore[arg-type]


def step_calls(
    query: jax.Array,  # [tokens, q_heads, head_dim]
    view: PagedAttentionCacheView,
    metadata: PagedAttentionMetadata,
    mask: Mask,
    sinks: jax.Array | None = None,  # [q_heads]
    new: tuple[ArrayLike, ArrayLike | None] | None = None,
) -> list[StepCall]:
    """Return the calls of the prefill, of the decode and of the ragged batch, as there are, checked."""
    advice = "give cache.views[i], the view of layer i"
    check_type("view", view, PagedAttentionCacheView, "a qpaged.PagedAttentionCacheView", advice)
    check_step(metadata)
    view = here(view)
    placement = view.placement
    groups = num_groups(placement)
    steps = [step.divided(groups) for step in metadata.steps()]
    stored_heads = view.key_pages.shape[0]
    check_query(
        query, sum(len(step.position) for step in steps) if steps else None, view.metadata, stored_heads
    )
    new_tokens = None if new is None else checked_new(new, len(query), view.metadata)
    if new_tokens is not None and placement is not None:
        new_tokens = NewTokens(*(placement.repeat_heads(rows, stored_heads) for rows in new_tokens))
    calls: list[StepCall] = []
    start = 0
    for step in steps:
        tokens = slice(start, start + len(step.position))
        start = tokens.stop
        own = None if new_tokens is None else NewTokens(new_tokens.key[tokens], new_tokens.value[tokens])
        if own is not None and not step.is_decode and (step.is_prefill or groups == 1):
            check_consecutive(step.position, step.starts)
        until = None if mask.until is None else mask.until[tokens]
        calls.append(StepCall(step, query[tokens], own, mask._replace(until=until), sinks))
    return calls


def check_shared_pages(calls: list[StepCall]) -> None:
    """Raise ValueError for what is not done where devices share the pages of a sequence."""
    if any(call.new is not None for call in calls):
        raise ValueError("new must be None where devices share the pages of a sequence; write first.")
    if any(call.mask.slopes is not None for call in calls):
        raise ValueError("alibi_slopes must be None where devices share the pages of a sequence.")


def token_group(view: PagedAttentionCacheView, call: StepCall) -> TokenGroup:
    """Return the queries of a call as the view's own device has them."""
    config, step, mask = view.metadata, call.step, call.mask
    table = step.table[:, : LARGEST_INDEX // config.page_size]  # no int32 position lies further
    slots = table.shape[1] * config.page_size
    flat = pools.as_flat(view.key_pages)
    if flat is not None:
        table = flat.place(table)
    position = jnp.where(step.position < slots, step.position, -1)
    span = mask.span(position, slots)
    is_until = mask.until is not None and mask.window is None
    if span is not None and is_until and call.new is None and mask.slopes is None:
        position, span = span.last, None  # those of causal queries that are further on, as kernels know
    if step.starts is not None:
        ragged = RaggedTokens(call.query, position, table, step.starts, span, mask.slopes)
        return TokenGroup(ragged, call.new)
    no_end = np.full(len(table), LARGEST_INDEX, np.int32)  # of NumPy, which dispatches nothing
    tokens = QueryTokens(call.query, position, table, no_end, span, mask.slopes)  # type: ignore[arg-type]
    return TokenGroup(tokens, call.new)
