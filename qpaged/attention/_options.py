"""What one attention call asks for, and what its backends share."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

FLOOR = -0.7 * float(jnp.finfo(jnp.float32).max)  # a score below all others, whose differences are finite


@dataclass(frozen=True)
class Options:
    """The keyword arguments of :func:`paged_attention`, checked."""

    softmax_scale: float
    sliding_window: int | None
    logits_soft_cap: float | None
    num_pages: int

    def scores(self, dots: jax.Array) -> jax.Array:
        """Scores from dot products of queries and keys, float32."""
        scores = dots * self.softmax_scale
        if self.logits_soft_cap is None:
            return scores
        return self.logits_soft_cap * jnp.tanh(scores / self.logits_soft_cap)

    def attends(self, position: jax.Array, table: jax.Array, slot: jax.Array, page_size: int) -> jax.Array:
        """(queries, slots): whether the query at ``position`` sees the logical ``slot``.

        Slots 0 to its own position, that one included, the last ``sliding_window`` of them, on pages
        that the ``table`` (pages,) holds. A negative position sees nothing.
        """
        page = table[slot // page_size]
        return self.in_sight(position[:, None], slot) & (page >= 0) & (page < self.num_pages)

    def in_sight(self, position: jax.Array, slot: jax.Array) -> jax.Array:
        """Whether a query at ``position`` sees the logical ``slot`` (broadcast), if a page holds it."""
        seen = slot <= position
        return seen if self.sliding_window is None else seen & (slot > position - self.sliding_window)

    def held(self, table: jax.Array, seen: jax.Array) -> jax.Array:
        """The pages (pages,) of which any slot is ``seen`` (queries, slots), "no page" for the others."""
        slots = jnp.where(seen.any(axis=0).reshape(len(table), -1), table[:, None], self.num_pages)
        return slots.min(axis=1)  # of what XLA on CPU sums up it keeps the result; a choice it makes anew


@dataclass(frozen=True)
class Tokens:
    """Queries of one kind: a prefill of one sequence, or one row for each of many.

    Attributes:
        query: (n, q_heads, head_dim).
        position: (n,) int32; negative where the query is to give zeros.
        table: (pages,) int32 for a prefill, (n, pages) for a decode.
    """

    query: jax.Array
    position: jax.Array
    table: jax.Array

    @property
    def is_prefill(self) -> bool:
        return self.table.ndim == 1


jax.tree_util.register_dataclass(Tokens, data_fields=["query", "position", "table"], meta_fields=[])


def grouped(query: jax.Array, kv_heads: int) -> jax.Array:
    """(n, q_heads, head_dim) as (kv_heads, n * group, head_dim): grouped queries share their head's keys."""
    n, q_heads, head_dim = query.shape
    group = q_heads // kv_heads
    return query.reshape(n, kv_heads, group, head_dim).swapaxes(0, 1).reshape(kv_heads, n * group, head_dim)


def ungrouped(out: jax.Array, n: int) -> jax.Array:
    """(kv_heads, n * group, head_dim) as (n, q_heads, head_dim): the inverse of :func:`grouped`."""
    kv_heads, rows, head_dim = out.shape
    return out.reshape(kv_heads, n, rows // n, head_dim).swapaxes(0, 1).reshape(n, -1, head_dim)
