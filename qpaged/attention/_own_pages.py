"""Attention of one of several devices that share the pages of a sequence: to its own pages alone.

Own pages are brought together, in order, and positions are counted among their slots. All pages before a
query's are seen whole, so that a causal mask stays one; what a kernel goes through are own pages only.
"""

import jax
import jax.numpy as jnp

from qpaged.attention._options import Span
from qpaged.attention._token_groups import StepCall
from qpaged.cache import PagedAttentionCacheView
from qpaged.cache._placement import own_pages
from qpaged.cache._step_tokens import Members, StepTokens


def of_own_pages(call: StepCall, view: PagedAttentionCacheView, index: jax.Array) -> StepCall:
    """Return a call with page tables, positions and masks as the device ``index`` has them.

    Args:
        call: with page tables in numbers of the group.
        view: of the device's pages.
    """
    step, page_size = call.step, view.metadata.page_size
    slots = step.table.shape[1] * page_size
    position = active_position(step, view)
    span = call.mask.span(position, slots)
    table = own_pages(step.table, view.metadata.num_pages_per_layer, index)
    is_own = table < view.metadata.num_pages_per_layer  # [sequences, pages]
    rank = jnp.cumsum(is_own, axis=1, dtype=jnp.int32) - is_own.astype(jnp.int32)  # own pages before each
    sequence = _sequence_of_tokens(step)

    def among_own(slot: jax.Array, missing: int) -> jax.Array:
        """Return where slots [tokens] are among the own ones; next to which, if they are of others."""
        page = jnp.maximum(slot, 0) // page_size
        before = rank[sequence, page] * page_size
        return before + jnp.where(is_own[sequence, page], slot % page_size, missing)

    seen = Span(jnp.zeros_like(position), position) if span is None else span
    last = jnp.where(seen.last >= 0, among_own(seen.last, -1), -1)
    own_span = None if span is None else Span(among_own(seen.first, 0), last)
    order = jnp.argsort(~is_own, axis=1, stable=True)
    own = step._replace(table=jnp.take_along_axis(table, order, axis=1), position=last)
    return call._replace(step=own, mask=call.mask._replace(window=None, until=None, given=own_span))


def active_position(step: StepTokens, view: PagedAttentionCacheView) -> jax.Array:
    """Return the position of each token, [tokens]; negative where it is of no sequence, or past the table."""
    position = step.position
    slots = step.table.shape[1] * view.metadata.page_size
    is_active = position < slots
    if step.starts is not None:
        is_active &= Members.of(step.starts, len(position)).is_member
    return jnp.where(is_active, position, -1)


def _sequence_of_tokens(step: StepTokens) -> jax.Array:
    """Return the sequence of each token, [tokens]; any for padding."""
    tokens = len(step.position)
    if step.starts is not None:
        return Members.of(step.starts, tokens).sequence
    return jnp.zeros(tokens, jnp.int32) if step.is_prefill else jnp.arange(tokens, dtype=jnp.int32)
