"""Laws 1 to 4 and 9 on what hypothesis draws: more values, orders and places than the kit tries."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.arrays import leaves_equal

import qpaged
from qpaged.testing import Subject
from qpaged.testing import _draws as draws
from qpaged.testing import _laws_places as places
from qpaged.testing import _laws_values as values
from qpaged.testing._pool import TABLE, TOKENS

FORMATS = ("int8", "int8:channel", "int8:token", "fp8_e4m3", "int4", "int4:channel+offset", "nvfp4")
SEEDS = st.integers(0, 2**32 - 1)
KINDS = st.sampled_from(draws.KINDS)

lawful = settings(max_examples=12, deadline=None, derandomize=True)
some_formats = pytest.mark.parametrize("subject", [Subject(format) for format in FORMATS], ids=str)


@st.composite
def chunks(draw):
    """Token indices in some order, cut somewhere: one prefill, chunks, token by token, shuffled."""
    rng = np.random.default_rng(draw(SEEDS))
    tokens = rng.permutation(TOKENS) if draw(st.booleans()) else np.arange(TOKENS)
    cuts = draw(st.sampled_from([0, 1, 3, TOKENS - 1]))
    return np.split(tokens, np.sort(rng.choice(np.arange(1, TOKENS), size=cuts, replace=False)))


@some_formats
@lawful
@given(kind=KINDS, seed=SEEDS, chunks=chunks())
def test_law_1_error(subject, kind, seed, chunks):
    values.error(subject, draws.rows(kind, seed, subject.shape), chunks, kind)


@some_formats
@lawful
@given(kind=KINDS, seed=SEEDS, chunks=chunks())
def test_law_2_order(subject, kind, seed, chunks):
    values.order(subject, draws.rows(kind, seed, subject.shape), chunks, kind)


@some_formats
@lawful
@given(kinds=st.tuples(KINDS, KINDS), seed=SEEDS, token=st.integers(0, TOKENS - 1))
def test_law_3_locality(subject, kinds, seed, token):
    rows, other = (draws.rows(kind, seed, subject.shape) for kind in kinds)
    places.locality(subject, rows, token, other[-1], kinds[0])


@some_formats
@lawful
@given(kind=KINDS, seed=SEEDS)
def test_law_4_totality(subject, kind, seed):
    places.totality(subject, draws.rows(kind, seed, subject.shape), *draws.places(seed))


@some_formats
@lawful
@given(kinds=st.tuples(KINDS, KINDS), seed=SEEDS, chunks=chunks())
def test_law_9_reuse(subject, kinds, seed, chunks):
    rows, later = (draws.rows(kind, seed, subject.shape) for kind in kinds)
    places.reuse(subject, rows, later, chunks, kinds[0])


@pytest.mark.parametrize("subject", [Subject(format) for format in FORMATS[::3]], ids=str)
def test_eager_writes_leave_what_jitted_ones_leave(subject):
    rows = draws.rows(draws.GAUSSIAN, 0, subject.shape)
    parts = np.arange(TOKENS, dtype=np.int32)

    def after(write):
        view = subject.fresh()
        for kept, factor in ((parts < 11, 1), (parts >= 11, 3)):
            metadata = qpaged.PagedAttentionMetadata.prefill(
                position=np.where(kept, parts, -1), page_table=TABLE
            )
            view = write(view, rows * factor, -rows * factor, metadata)
        return view

    def jitted(view, keys, _, metadata):
        return subject.write(view, keys, metadata.prefill_position, metadata.prefill_page_table)

    eager = qpaged.PagedAttentionCacheView.write_prefill_to_cache
    assert leaves_equal(after(jitted).key_pages, after(eager).key_pages)
