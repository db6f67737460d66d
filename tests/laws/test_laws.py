"""Laws 1 to 4 and 9, for every registered format and granularity."""

import jax
import jax.numpy as jnp
import laws
import numpy as np
import pytest
from draws import chunks, places, rows
from formats import DTYPES, FORMATS, leaves_equal
from hypothesis import given, settings
from hypothesis import strategies as st

import qpaged

lawful = settings(max_examples=25, deadline=None, derandomize=True)
every_format = pytest.mark.parametrize("format", FORMATS)


@every_format
@lawful
@given(rows=rows(), chunks=chunks())
def test_law_1_error(format, rows, chunks):
    laws.error(laws.Subject(format), rows, chunks)


@every_format
@lawful
@given(rows=rows(), chunks=chunks())
def test_law_2_order(format, rows, chunks):
    laws.order(laws.Subject(format), rows, chunks)


@every_format
@lawful
@given(rows=rows(), token=st.integers(0, laws.TOKENS - 1), other=rows())
def test_law_3_locality(format, rows, token, other):
    laws.locality(laws.Subject(format), rows, token, other[token])


@every_format
@lawful
@given(rows=rows(), places=places())
def test_law_4_totality(format, rows, places):
    laws.totality(laws.Subject(format), rows, *places)


@every_format
@lawful
@given(rows=rows(), next_rows=rows(), chunks=chunks())
def test_law_9_reuse(format, rows, next_rows, chunks):
    laws.reuse(laws.Subject(format), rows, next_rows, chunks)


@every_format
def test_fresh_pages_read_as_zeros(format):
    laws.fresh_reads_as_zeros(laws.Subject(format))


@every_format
def test_decodes_leave_what_a_prefill_leaves(format):
    subject = laws.Subject(format)
    values = np.random.default_rng(0).normal(size=(laws.TOKENS, laws.HEADS, laws.HEAD_DIM)).astype(np.float32)
    whole = laws.in_chunks(subject, subject.fresh(), values, [np.arange(laws.TOKENS)])
    view = subject.fresh()
    for token in range(laws.TOKENS):  # the sequence is row 1 of a batch whose row 0 is inactive
        batch = np.stack([np.full_like(values[0], 1e6), values[token]])
        view = subject.decode(view, batch, np.array([-1, token]), np.stack([laws.TABLE, laws.TABLE]))
    if subject.quantizer.order_bound:
        assert leaves_equal(view.key_pages.scales, whole.key_pages.scales)
        laws.assert_within_bound(subject, view.key_pages, values)
    else:
        assert leaves_equal(view, whole)


@every_format
def test_eager_writes_leave_what_jitted_ones_leave(format):
    subject = laws.Subject(format)
    values = np.random.default_rng(1).normal(size=(laws.TOKENS, laws.HEADS, laws.HEAD_DIM)).astype(np.float32)
    eager = qpaged.PagedAttentionCacheView.write_prefill_to_cache
    parts = np.arange(laws.TOKENS, dtype=np.int32)
    first, second = np.where(parts < 11, parts, -1), np.where(parts < 11, -1, parts)
    jitted = subject.write(subject.write(subject.fresh(), values, first), values * 3, second)
    bare = subject.write(
        subject.write(subject.fresh(), values, first, write=eager), values * 3, second, write=eager
    )
    assert leaves_equal(jitted, bare)


@every_format
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: jnp.dtype(dtype).name)
def test_values_in_the_logical_dtype_are_rounded_once(format, dtype):
    subject = laws.Subject(format, dtype)
    values = np.random.default_rng(2).normal(size=(laws.TOKENS, laws.HEADS, laws.HEAD_DIM)) * 100
    values[3] = jnp.finfo(dtype).max
    values = np.asarray(values.astype(dtype), np.float32)
    pages = laws.in_chunks(subject, subject.fresh(), values, [np.arange(laws.TOKENS)]).key_pages
    laws.assert_within_bound(subject, pages, values)
    materialized = jax.jit(lambda pages: pages.materialize())(pages)
    assert materialized.dtype == pages.dtype == jnp.dtype(dtype)
    assert np.isfinite(np.asarray(materialized, np.float32)).all()
    largest = np.float32(jnp.finfo(dtype).max)
    np.testing.assert_array_equal(materialized, np.clip(laws.VALUES(pages), -largest, largest).astype(dtype))


@every_format
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_touch_no_other_block(format, bad):
    subject = laws.Subject(format)
    values = np.random.default_rng(3).normal(size=(laws.TOKENS, laws.HEADS, laws.HEAD_DIM)).astype(np.float32)
    poisoned = values.copy()
    poisoned[9, 1, 5] = bad
    clean, dirty = (
        laws.in_chunks(subject, subject.fresh(), v, [np.arange(laws.TOKENS)]) for v in (values, poisoned)
    )
    read = laws.slots(laws.VALUES(dirty.key_pages))
    if format == "raw":
        np.testing.assert_array_equal(read[9, 1, 5], bad)
    elif np.isnan(bad):  # a NaN is stored as 0
        want = poisoned.copy()
        want[9, 1, 5] = 0
        laws.assert_within_bound(subject, dirty.key_pages, want)
    else:  # an infinity as the largest finite number
        want = poisoned.copy()
        want[9, 1, 5] = np.sign(bad) * np.finfo(np.float32).max
        laws.assert_within_bound(subject, dirty.key_pages, want)
    block = dirty.key_pages.block
    for old, new in zip(
        jax.tree_util.tree_leaves(clean.key_pages), jax.tree_util.tree_leaves(dirty.key_pages), strict=True
    ):
        old, new = np.array(old), np.array(new)
        for leaf in (old, new):
            slot = slice(None) if block[2] > 1 or leaf.shape[2] == 1 else 1
            channel = slice(None) if block[3] > 1 or leaf.shape[3] == 1 else 5
            leaf[1, laws.TABLE[1], slot, channel] = 0
        assert old.tobytes() == new.tobytes()
