"""Attention to pools with exact pages: the newest tokens as they were written, the others as packed."""

import functools
import itertools

import jax
import numpy as np
import pytest
from support.arrays import normal
from support.attention_oracle import attention_and_lse
from support.caches import (
    HEAD_DIM,
    HEADS,
    SEQUENCE_PAGES,
    attend,
    bits,
    decode,
    make_view,
    prefill,
    write_decodes,
    write_prefill,
)
from support.exact_pages import NO_PAGE, filled, rows, slots_of
from support.long import first_short

import qpaged
from qpaged import pools

ATTENTION = {
    "int8:token+exact5+sink4": {},
    "int4+rotate+exact8": {"sliding_window": 6},
    "int4:channel+offset+exact9/int4:token+rotate+exact1+sink4": {"logits_soft_cap": 3.0},
    "int8/int4+exact6": {"sliding_window": 3},
    "plain/nvfp4+exact2+sink1": {},
}


@functools.partial(jax.jit, static_argnames=("backend", "sliding_window", "logits_soft_cap", "return_lse"))
def attend_with(query, view, step, **options):
    return qpaged.paged_attention(query, view, step, **options)


@pytest.mark.short(2)
@pytest.mark.parametrize("kind", ["decode", "prefill"])
@pytest.mark.parametrize("spelling", first_short(2, tuple(ATTENTION)))
@pytest.mark.parametrize("backend", first_short(1, [None, "reference"]))
def test_attention_reads_what_the_pools_hold(backend, spelling, kind):
    options = ATTENTION[spelling]
    view, tables = filled(spelling)
    query = np.random.default_rng(5).normal(size=(2, 4, HEAD_DIM)).astype(np.float32)
    position = np.array([13, 8])
    if kind == "decode":
        step = decode(position, tables)
        every_table = tables
    else:
        position = np.array([11, 13])
        step, every_table = prefill(position, tables[0]), tables[[0, 0]]
    sinks = normal(4, seed=8)
    out, lse = attend_with(query, view, step, backend=backend, sinks=sinks, return_lse=True, **options)
    want_out, want_lse = attention_and_lse(
        query,
        slots_of(view.key_pages),
        slots_of(view.value_pages),
        position,
        every_table,
        HEAD_DIM**-0.5,
        options.get("sliding_window"),
        options.get("logits_soft_cap"),
        np.asarray(sinks),
    )
    # float32 sums of some tens of products in other orders, through an exponential
    np.testing.assert_allclose(out, want_out, rtol=1e-5, atol=2e-5)
    np.testing.assert_allclose(lse, want_lse, rtol=1e-5, atol=2e-5)


def test_the_last_tokens_and_the_first_are_read_as_they_were_written():
    view, tables = filled("int2+offset+exact5+sink4")
    plain, _ = filled(None)
    got, want = slots_of(view.key_pages), slots_of(plain.key_pages)
    read, written = (pool[:, tables[0]].reshape(HEADS, -1, HEAD_DIM) for pool in (got, want))
    same = (read == written).all(axis=(0, 2))
    assert same[:4].all() and same[14 - 5 : 14].all() and not same[4:8].any()


@pytest.mark.parametrize(
    "spelling", first_short(1, ("int4+exact8", "int8:channel+exact5+sink4", "nvfp4+exact1"))
)
def test_chunks_do_not_matter_to_the_codes(spelling):
    key, table = rows(np.random.default_rng(1), 14), np.array([3, 1, 7, 2])
    held = []
    for cuts in ((0, 14), (0, 3, 9, 14), tuple(range(15))):
        view = make_view(spelling)
        for start, end in itertools.pairwise(cuts):
            padded = np.zeros((14, HEADS, HEAD_DIM), np.float32)
            padded[: end - start] = key[start:end]
            position = np.where(np.arange(14) < end - start, start + np.arange(14), -1)
            view = write_prefill(view, padded, padded, prefill(position, table, end - start))
        held.append((slots_of(view.key_pages), np.asarray(pools.is_exact(view.key_pages, table))))
    for slots, exact in held[1:]:
        np.testing.assert_array_equal(slots, held[0][0])
        np.testing.assert_array_equal(exact, held[0][1])


def test_rejected_drafts_touch_no_scale():
    """Drafts thirty times as loud are written, rejected, and written over by the rows that are kept."""
    key, table = rows(np.random.default_rng(2), 14), np.array([3, 1, 7, 2])
    views = []
    for drafts in (False, True):
        view = make_view("int8+exact8")
        for position in range(14):
            if drafts:
                loud = 30 * rows(np.random.default_rng(position), 3)
                places = np.minimum(position + np.arange(3), 15)
                view = write_prefill(view, loud, loud, prefill(places, table))
            view = write_prefill(view, key[[position]], key[[position]], prefill(np.array([position]), table))
        views.append(view.pack_pages(table, np.array([4, 4, 4, 2])))
    np.testing.assert_array_equal(slots_of(views[0].key_pages), slots_of(views[1].key_pages))


def test_new_tokens_are_read_as_given_before_they_are_written():
    view, tables = filled("int4+exact6")
    query, key, value = (rows(np.random.default_rng(seed), 2) for seed in (3, 4, 5))
    step = decode(np.array([14, 9]), tables)
    out = qpaged.paged_attention(query, view, step, new=(key, value))
    np.testing.assert_allclose(
        out, attend(query, write_decodes(view, key, value, step), step), rtol=1e-5, atol=1e-5
    )


def test_stale_entries_of_a_table_mix_no_rows():
    """A page that one sequence released and another has now is packed; the rows of both stay theirs."""
    view = make_view("int8+exact1")
    released, other = np.array([3, 1, 7, 2]), np.array([9, 3, NO_PAGE, NO_PAGE])
    key = rows(np.random.default_rng(1), 9)
    view = write_prefill(view, key[:5], key[:5], prefill(np.arange(5), other))
    view = write_prefill(view, key[:4], key[:4], prefill(np.arange(8, 12), np.array([NO_PAGE, 1, 7, 2])))
    view = write_decodes(view, key[5:7], key[5:7], decode(np.array([12, 4]), np.stack([released, other])))
    held = slots_of(view.key_pages)
    np.testing.assert_array_equal(held[:, 2, 0], key[5])
    np.testing.assert_allclose(held[:, 3, 0], key[6], atol=0.05)


def test_pages_that_no_query_sees_take_no_place():
    view = make_view("int8+exact1")
    key = rows(np.random.default_rng(1), 1)
    view = write_prefill(view, key, key, prefill(np.array([12]), np.array([5, 5, 5, 2])))
    view = write_prefill(view, key, key, prefill(np.array([0]), np.array([5, NO_PAGE, NO_PAGE, NO_PAGE])))
    step = decode(np.array([12]), np.array([[5, 5, 5, 2]]))
    query = np.ones((1, 2, HEAD_DIM), np.float32)
    out = qpaged.paged_attention(query, view, step, sliding_window=1)
    np.testing.assert_allclose(out, key, rtol=1e-6)


def test_more_exact_pages_than_a_write_leaves_give_nan():
    view = make_view("int8+exact1")
    key, table = rows(np.random.default_rng(1), 14), np.array([3, 1, 7, 2])
    view = write_prefill(view, key, key, prefill(np.arange(14), table))
    view = write_prefill(view, key[:1], key[:1], prefill(np.array([5]), table))  # far behind the newest
    query, step = np.ones((1, 2, HEAD_DIM), np.float32), decode(np.array([13]), table[None])
    assert np.isnan(attend(query, view, step)).all()
    view = write_decodes(view, key[:1], key[:1], step)
    assert np.isfinite(attend(query, view, step)).all()


@pytest.mark.parametrize("write", ["prefill", "decode"])
def test_no_tokens_are_written(write):
    view, table = make_view("int8+exact5"), np.array([3, 1, 7, 2])
    nothing = np.zeros((0, HEADS, HEAD_DIM), np.float32)
    if write == "prefill":
        after = write_prefill(view, nothing, nothing, prefill(np.zeros(0, np.int32), table))
    else:
        step = decode(np.zeros(0, np.int32), np.zeros((0, SEQUENCE_PAGES), np.int32))
        after = write_decodes(view, nothing, nothing, step)
    assert bits(after) == bits(view)
