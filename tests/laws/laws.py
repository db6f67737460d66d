"""The laws as checks of a subject: a format, and the way its pages are written.

Each check takes a subject and raises AssertionError where the law is broken; the mutation tests hand it
subjects that break it.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from formats import leaves_equal, multipliers

import qpaged

HEADS, PAGES, PAGE_SIZE, HEAD_DIM = 2, 6, 8, 16
TOKENS = 20  # of a sequence that lies on three pages, not all full
TABLE = np.array([4, 1, 3], np.int32)
SMALLEST = 2.0**-126  # what is smaller counts as zero

WRITE = jax.jit(qpaged.PagedAttentionCacheView.write_prefill_to_cache)
DECODE = jax.jit(qpaged.PagedAttentionCacheView.write_decodes_to_cache)
RESET = jax.jit(qpaged.PagedAttentionCacheView.reset_pages)
VALUES = jax.jit(lambda pages: pages.dequantize() if isinstance(pages, qpaged.QuantizedArray) else pages)
FACTORS = jax.jit(multipliers)


def configuration(pages=PAGES):
    return qpaged.PagedAttentionCacheMetaData(4, 1, pages, 3, TOKENS, PAGE_SIZE, HEADS, HEAD_DIM, 0.5)


@dataclass(frozen=True)
class Subject:
    """A format under test; a mutant overrides a method."""

    format: Any
    dtype: Any = jnp.float32

    @property
    def quantizer(self):
        return qpaged.get_quantizer(self.format)

    def fresh(self):
        return qpaged.PagedAttentionCacheView.init(None, self.dtype, configuration(), 0, None, self.format)

    def write(self, view, rows, position, table=TABLE, write=WRITE):
        """``rows`` (TOKENS, heads, head_dim) written as keys and, negated, as values."""
        metadata = qpaged.PagedAttentionMetadata.prefill(position=position, page_table=table)
        return write(view, rows, -rows, metadata)

    def decode(self, view, rows, position, table):
        metadata = qpaged.PagedAttentionMetadata.decode(position=position, page_table=table)
        return DECODE(view, rows, -rows, metadata)

    def reset(self, view, pages):
        return RESET(view, pages)


def in_chunks(subject, view, rows, chunks):
    """``rows`` written chunk by chunk; each chunk is an array of token indices. One compiled program."""
    for chunk in chunks:
        position = np.full(TOKENS, -1, np.int32)
        position[: len(chunk)] = chunk
        order = np.zeros(TOKENS, np.int32)
        order[: len(chunk)] = chunk
        view = subject.write(view, rows[order], position)
    return view


def slots(pages, table=TABLE, tokens=TOKENS):
    """(tokens, heads, head_dim): what a pool's values hold for a sequence."""
    ordered = np.swapaxes(np.asarray(pages)[:, table], 0, 1).swapaxes(1, 2)
    return ordered.reshape(-1, *ordered.shape[2:])[:tokens]


def assert_within_bound(subject, pages, want, table=TABLE):
    """Law 1 for the ``want`` (tokens, heads, head_dim) that ``pages`` should hold."""
    got = slots(VALUES(pages), table, len(want))
    bound = subject.quantizer.error_bound(want, slots(FACTORS(pages), table, len(want)))
    error = np.abs(got.astype(np.float64) - want)
    assert (error <= np.asarray(bound, np.float64) + SMALLEST).all(), (
        f"{subject.format}: a value read back differs by {error.max()} where its bound allows "
        f"{np.asarray(bound).flat[error.argmax()]}"
    )


def error(subject, rows, chunks):
    """Law 1: in whatever order tokens are written, each reads back within the format's bound."""
    view = in_chunks(subject, subject.fresh(), rows, chunks)
    assert_within_bound(subject, view.key_pages, rows)
    assert_within_bound(subject, view.value_pages, -rows)


def order(subject, rows, chunks):
    """Law 2: one prefill and any chunks in any order leave the same codes and scales."""
    whole = in_chunks(subject, subject.fresh(), rows, [np.arange(TOKENS)])
    parts = in_chunks(subject, subject.fresh(), rows, chunks)
    if subject.quantizer.order_bound == 0:
        assert leaves_equal(whole, parts), f"{subject.format}: codes or scales depend on the order of writes"
        return
    for one, other in ((whole.key_pages, parts.key_pages), (whole.value_pages, parts.value_pages)):
        assert leaves_equal(one.scales, other.scales), (
            f"{subject.format}: scales depend on the order of writes"
        )
        apart = np.abs(np.asarray(VALUES(one), np.float64) - VALUES(other))
        bound = subject.quantizer.order_bound * np.asarray(FACTORS(one), np.float64)
        assert (apart <= bound).all(), f"{subject.format}: two orders are further apart than declared"


def locality(subject, rows, token, new):
    """Law 3: writing one more row changes the blocks it writes into, and no other bit."""
    before = in_chunks(subject, subject.fresh(), rows, [np.arange(TOKENS)])
    again = rows.copy()
    again[token] = new
    position = np.full(TOKENS, -1, np.int32)
    position[0] = token
    after = subject.write(before, np.broadcast_to(new, rows.shape), position)
    page, slot = TABLE[token // PAGE_SIZE], token % PAGE_SIZE
    for old, now, want in (
        (before.key_pages, after.key_pages, again),
        (before.value_pages, after.value_pages, -again),
    ):
        assert_within_bound(subject, now, want)
        for name, a, b in zip(
            "cs", jax.tree_util.tree_leaves(old), jax.tree_util.tree_leaves(now), strict=False
        ):
            a, b = np.array(a), np.array(b)
            a[:, page, slot if a.shape[2] > 1 and _lone(now) else slice(None)] = 0
            b[:, page, slot if b.shape[2] > 1 and _lone(now) else slice(None)] = 0
            assert a.tobytes() == b.tobytes(), f"{subject.format}: a write changed {name} of another block"


def _lone(pages) -> bool:
    """Whether a slot shares its scales with no other."""
    return not isinstance(pages, qpaged.QuantizedArray) or pages.block[2] == 1


def totality(subject, rows, position, table):
    """Law 4: rows whose position or page is out of range are dropped, never clamped or wrapped."""
    lands = (position >= 0) & (position < len(table) * PAGE_SIZE)
    page = table[np.where(lands, position // PAGE_SIZE, 0)]
    lands &= (page >= 0) & (page < PAGES)
    base = in_chunks(subject, subject.fresh(), rows[::-1].copy(), [np.arange(TOKENS)])
    everything = subject.write(base, rows, position, table)
    only = subject.write(base, np.where(lands[:, None, None], rows, 0), np.where(lands, position, -1), table)
    assert leaves_equal(everything, only), f"{subject.format}: a row without a place was written"
    nothing = subject.write(base, rows, np.where(lands, -1, position), table)
    assert leaves_equal(nothing, base), f"{subject.format}: rows without a place changed the pool"


def reuse(subject, rows, next_rows, chunks):
    """Law 9: a page that was reset carries nothing of its earlier sequence."""
    used = in_chunks(subject, subject.fresh(), rows, [np.arange(TOKENS)])
    again = in_chunks(subject, subject.reset(used, TABLE), next_rows, chunks)
    never = in_chunks(subject, subject.fresh(), next_rows, chunks)
    assert leaves_equal(again, never), f"{subject.format}: a page that was reset remembers"


def fresh_reads_as_zeros(subject):
    """A fresh page, and one that was reset, reads as exact zeros."""
    view = subject.fresh()
    for pages in (view.key_pages, view.value_pages):
        assert not np.asarray(VALUES(pages)).any(), f"{subject.format}: a fresh page does not read as zeros"
