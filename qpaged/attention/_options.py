"""The call that a backend gets: the options, the query tokens, and the masks that follow from both."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from qpaged.pools import Pages

Result = TypeVar("Result")

# The score of a masked slot: below every real score, but finite, so that differences of scores are no NaN.
MASK_VALUE = -0.7 * float(jnp.finfo(jnp.float32).max)


class Span(NamedTuple):
    """The slots that queries see, from ``first`` to ``last``, both included; none where ``last`` is negative.

    Attributes:
        first: [...] int32, for instance of [queries].
        last: likewise.
    """

    first: jax.Array
    last: jax.Array

    def sees(self, slot: jax.Array) -> jax.Array:
        """Return [..., slots], True where a query sees a slot [slots], if the slot's page exists."""
        return (self.first[..., None] <= slot) & (slot <= self.last[..., None])

    def take(self, token: jax.Array, is_token: jax.Array) -> "Span":
        """Return the spans of tokens [n]; empty where ``is_token`` [n] is False."""
        return Span(self.first[token], jnp.where(is_token, self.last[token], -1))


@dataclass(frozen=True)
class Options:
    """The static keyword arguments of :func:`paged_attention`, checked, and the number of pages in a pool."""

    softmax_scale: float
    sliding_window: int | None
    logits_soft_cap: float | None
    num_pages: int

    def scale_and_cap(self, dots: jax.Array) -> jax.Array:
        """Return the scores of float32 dot products of queries and keys."""
        scores = dots * self.softmax_scale
        if self.logits_soft_cap is None:
            return scores
        return self.logits_soft_cap * jnp.tanh(scores / self.logits_soft_cap)

    def attention_mask(
        self,
        span: Span,  # of [queries]
        end: jax.Array,  # []
        pages: jax.Array,  # [pages], some of the sequence's
        first_slot: int | jax.Array,  # of these pages, counted from the sequence's first
        page_size: int,
    ) -> jax.Array:
        """Return [queries, slots], True where a query sees a slot of the pages.

        A query sees its span, as far as it is before ``end`` and the page table has pages for it.
        """
        page = jnp.repeat(pages, page_size)
        slot = first_slot + jnp.arange(len(page), dtype=jnp.int32)
        exists = (slot < end) & (page >= 0) & (page < self.num_pages)
        return span.sees(slot) & exists

    def position_mask(self, position: jax.Array, slot: jax.Array) -> jax.Array:
        """Return True where a query at ``position`` sees ``slot``, if the slot's page exists; broadcasts.

        The causal mask of the kernels, which know no other.
        """
        causal = slot <= position
        if self.sliding_window is None:
            return causal
        return causal & (slot > position - self.sliding_window)

    def sees_page(
        self,
        span: Span,  # of [queries]
        end: jax.Array,  # []
        page: jax.Array,  # [pages], counted from the sequence's first
        page_size: int,
    ) -> jax.Array:
        """Return [pages], True where a query sees a slot of the page, if it exists."""
        first_slot = page * page_size
        seen = (first_slot <= span.last[:, None]) & (first_slot < end)
        return (seen & (first_slot + page_size > span.first[:, None])).any(axis=0)

    def visible_pages(
        self,
        pages: jax.Array,  # [pages]
        mask: jax.Array,  # [queries, slots], from attention_mask
    ) -> jax.Array:
        """Return pages with "no page" for the pages that no query sees."""
        slot_visible = mask.any(axis=0).reshape(len(pages), -1)
        # A reduction, because XLA on CPU stores its result. A select alone would be fused into the gather of
        # the pages, and computed again for every element.
        return jnp.where(slot_visible, pages[:, None], self.num_pages).min(axis=1)


@dataclass(frozen=True)
class QueryTokens:
    """Queries in runs of one length: a run's are of one sequence.

    A prefill is one run, and decode rows are runs of one token.

    Attributes:
        query: [runs * run_length, q_heads, head_dim].
        position: [runs * run_length] int32; negative for padding and inactive rows, whose output is zeros.
        table: [runs, pages] int32, the page table of each run's sequence.
        end: [runs] int32, the first slot that no query of the run sees.
        span: of [runs * run_length], which slots each query sees; None for those up to its position, as far
            as the options' sliding window goes.
        slopes: [q_heads] float32; a score falls by so much with each position between slot and query (ALiBi).
            None for no such fall.
    """

    query: jax.Array
    position: jax.Array
    table: jax.Array
    end: jax.Array
    span: Span | None = None
    slopes: jax.Array | None = None

    @property
    def run_length(self) -> int:
        """Tokens of a run."""
        return len(self.query) // len(self.table)

    def by_run(self, of_tokens: jax.Array) -> jax.Array:
        """Return something of each token [tokens, ...] as [runs, run_length, ...]."""
        return of_tokens.reshape(len(self.table), self.run_length, *of_tokens.shape[1:])

    def span_within(self, window: int | None) -> Span:
        """Return which slots each query sees, where it is not given, with the options' sliding window."""
        if self.span is not None:
            return self.span
        if window is None:
            return Span(jnp.zeros_like(self.position), self.position)
        return Span(jnp.maximum(self.position - (window - 1), 0), self.position)


@functools.lru_cache(maxsize=256)
def with_options(
    attend: Callable[[QueryTokens, Pages, Pages, Options], Result], options: Options
) -> Callable[[QueryTokens, Pages, Pages], Result]:
    """Return the same function object for the same options, so that JAX traces it once."""

    def attend_with_options(tokens: QueryTokens, keys: Pages, values: Pages) -> Result:
        return attend(tokens, keys, values, options)

    return attend_with_options


jax.tree_util.register_dataclass(
    QueryTokens, data_fields=["query", "position", "table", "end", "span", "slopes"], meta_fields=[]
)


def distance_bias(
    slopes: jax.Array,  # [q_heads]
    position: jax.Array,  # [queries]
    slot: jax.Array,  # [slots]
    kv_heads: int,
) -> jax.Array:
    """Return what ALiBi adds to scores, [kv_heads, q_rows, slots]: minus the slope for each position between.

    Press et al., "Train Short, Test Long", 2022. Slots ahead of the query are as far away as those behind it.
    """
    distance = jnp.abs(slot - position[:, None]).astype(jnp.float32)
    bias = -slopes[:, None] * distance[:, None, :]  # [queries, q_heads, slots]
    return group_query_heads(bias, kv_heads)


def group_query_heads(query: jax.Array, kv_heads: int) -> jax.Array:
    """Return a query [tokens, q_heads, head_dim] as [kv_heads, tokens * q_heads_per_kv, head_dim]."""
    tokens, q_heads, head_dim = query.shape
    q_heads_per_kv = q_heads // kv_heads
    query = query.reshape(tokens, kv_heads, q_heads_per_kv, head_dim).swapaxes(0, 1)
    return query.reshape(kv_heads, tokens * q_heads_per_kv, head_dim)


def ungroup_query_heads(rows: jax.Array, tokens: int) -> jax.Array:
    """Undo :func:`group_query_heads`: return rows [kv_heads, q_rows, ...] as [tokens, q_heads, ...]."""
    kv_heads, q_rows, *rest = rows.shape
    q_heads_per_kv = q_rows // tokens
    rows = rows.reshape(kv_heads, tokens, q_heads_per_kv, *rest).swapaxes(0, 1)
    return rows.reshape(tokens, kv_heads * q_heads_per_kv, *rest)
