"""The queries of a call, by kind, and which slots each sees."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
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
from qpaged.attention._new_tokens import NewTokens
from qpaged.attention._options import QueryTokens, Span
from qpaged.attention._ragged import RaggedTokens, split
from qpaged.cache import PagedAttentionCacheView, PagedAttentionMetadata
from qpaged.cache._config import LARGEST_INDEX
from qpaged.cache._metadata import check_step


class Mask(NamedTuple):
    """What the queries of a call see beside, or instead of, all that is before them; checked.

    Attributes:
        window: the sliding window, where options do not have it: traced, or with ``until``; else None.
        until: [tokens] int32, the last position that each query sees, where it is beyond its own; or None.
        slopes: [q_heads] float32, or None.
    """

    window: int | jax.Array | None = None
    until: jax.Array | None = None
    slopes: jax.Array | None = None

    def span(self, position: jax.Array, here: slice, slots: int) -> Span | None:
        """Return what the tokens ``here``, at positions [n], see of so many slots; None if options say it."""
        if self.window is None and self.until is None:
            return None
        first, last = jnp.zeros_like(position), position
        if self.window is not None:
            first = jnp.maximum(position - (jnp.maximum(self.window, 1) - 1), 0)
        if self.until is not None:
            further = jnp.maximum(position, jnp.minimum(self.until[here], slots - 1))
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

    def parts(self) -> tuple[QueryTokens, ...]:
        """Return the queries as backends take them."""
        if self.is_empty:
            return ()
        if not isinstance(self.tokens, RaggedTokens):
            return (self.tokens,)
        batch = split(self.tokens)
        return batch.rows, batch.runs


def token_groups(
    query: jax.Array,
    view: PagedAttentionCacheView,
    metadata: PagedAttentionMetadata,
    mask: Mask,
    new: tuple[ArrayLike, ArrayLike | None] | None = None,
) -> list[TokenGroup]:
    """Return the tokens of the prefill, of the decode and of the ragged batch, as there are."""
    advice = "give cache.views[i], the view of layer i"
    check_type("view", view, PagedAttentionCacheView, "a qpaged.PagedAttentionCacheView", advice)
    check_step(metadata)
    config = view.metadata
    steps = metadata.steps()
    check_query(query, sum(len(step.position) for step in steps) if steps else None, config)
    new_tokens = None if new is None else checked_new(new, len(query), config)
    groups: list[TokenGroup] = []
    flat, start = pools.as_flat(view.key_pages), 0
    for step in steps:
        table = step.table[:, : LARGEST_INDEX // config.page_size]  # no int32 position lies further
        slots = table.shape[1] * config.page_size
        position = jnp.where(step.position < slots, step.position, -1)
        if flat is not None:
            table = flat.place(table)
        here = slice(start, start + len(position))
        start = here.stop
        span = mask.span(position, here, slots)
        if span is not None and new is None and mask.window is None and mask.slopes is None:
            position, span = span.last, None  # those of causal queries that are further on, as kernels know
        own = None if new_tokens is None else NewTokens(new_tokens.key[here], new_tokens.value[here])
        if own is not None and not step.is_decode:
            check_consecutive(position, step.starts)
        if step.starts is not None:
            ragged = RaggedTokens(query[here], position, table, step.starts, span, mask.slopes)
            groups.append(TokenGroup(ragged, own))
            continue
        no_end = np.full(len(table), LARGEST_INDEX, np.int32)  # of NumPy, which dispatches nothing
        tokens = QueryTokens(query[here], position, table, no_end, span, mask.slopes)  # type: ignore[arg-type]
        groups.append(TokenGroup(tokens, own))
    return groups
