"""Laws 1 to 4 and 9 on what hypothesis draws: more values, orders and indices than the kit tries."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.arrays import leaves_equal
from support.long import first_short

import qpaged
from qpaged.testing import Subject
from qpaged.testing import _inputs as inputs
from qpaged.testing import _laws_error as errors
from qpaged.testing import _laws_locality as locality
from qpaged.testing._pools import TABLE, TOKENS

FORMATS = ("int8:channel", "int4:channel+offset", "fp8_e4m3", "nvfp4")  # the kit tests the commonest anyway
SEEDS = st.integers(0, 2**32 - 1)
KINDS = st.sampled_from(inputs.KINDS)

lawful = settings(max_examples=12, deadline=None, derandomize=True)
some_formats = pytest.mark.parametrize("subject", first_short(2, map(Subject, FORMATS)), ids=str)


@st.composite
def chunks(draw):
    """Draw token indices in some order, cut into chunks: one prefill, a few, or token by token."""
    rng = np.random.default_rng(draw(SEEDS))
    tokens = rng.permutation(TOKENS) if draw(st.booleans()) else np.arange(TOKENS)
    cuts = draw(st.sampled_from([0, 1, 3, TOKENS - 1]))
    return np.split(tokens, np.sort(rng.choice(np.arange(1, TOKENS), size=cuts, replace=False)))


@some_formats
@lawful
@given(kind=KINDS, seed=SEEDS, chunks=chunks())
def test_law_1_error(subject, kind, seed, chunks):
    errors.error(subject, inputs.rows(kind, seed, subject.shape), chunks, kind)


@some_formats
@lawful
@given(kind=KINDS, seed=SEEDS, chunks=chunks())
def test_law_2_order(subject, kind, seed, chunks):
    errors.order(subject, inputs.rows(kind, seed, subject.shape), chunks, kind)


@some_formats
@lawful
@given(kinds=st.tuples(KINDS, KINDS), seed=SEEDS, token=st.integers(0, TOKENS - 1))
def test_law_3_locality(subject, kinds, seed, token):
    rows = inputs.rows(kinds[0], seed, subject.shape)
    other = inputs.rows(kinds[1], seed, subject.shape)
    locality.locality(subject, rows, token, other[-1], kinds[0])


@some_formats
@lawful
@given(kind=KINDS, seed=SEEDS)
def test_law_4_totality(subject, kind, seed):
    locality.totality(subject, inputs.rows(kind, seed, subject.shape), *inputs.indices_out_of_range(seed))


@some_formats
@lawful
@given(kinds=st.tuples(KINDS, KINDS), seed=SEEDS, chunks=chunks())
def test_law_9_reuse(subject, kinds, seed, chunks):
    rows = inputs.rows(kinds[0], seed, subject.shape)
    later = inputs.rows(kinds[1], seed, subject.shape)
    locality.reuse(subject, rows, later, chunks, kinds[0])


@pytest.mark.parametrize("subject", [Subject(format) for format in ("int8", "nvfp4")], ids=str)
def test_eager_writes_leave_what_jitted_ones_leave(subject):
    rows = inputs.rows(inputs.GAUSSIAN, 0, subject.shape)
    tokens = np.arange(TOKENS, dtype=np.int32)

    def after(write):
        view = subject.fresh()
        for written, factor in ((tokens < 11, 1), (tokens >= 11, 3)):
            metadata = qpaged.PagedAttentionMetadata.prefill(
                position=np.where(written, tokens, -1), page_table=TABLE
            )
            view = write(view, rows * factor, -rows * factor, metadata)
        return view

    def jitted(view, keys, _, metadata):
        return subject.write(view, keys, metadata.prefill_position, metadata.prefill_page_table)

    eager = qpaged.PagedAttentionCacheView.write_prefill_to_cache
    assert leaves_equal(after(jitted).key_pages, after(eager).key_pages)
