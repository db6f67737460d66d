"""The xla backend as it is on GPUs, run here: many lanes at a step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qpaged
from qpaged.attention import _xla, _xla_lanes, _xla_tiles

FORMATS = "plain", "int8", "int4+rotate", "int6:token"
PAGE_SIZE, KV_HEADS, Q_HEADS, HEAD_DIM, PAGES = 4, 2, 4, 32, 64


@pytest.fixture(autouse=True)
def few_slots_at_a_step(monkeypatch):
    """Make lanes so few and tiles so short that small caches take several steps."""
    monkeypatch.setattr(_xla_lanes, "SLOTS_PER_STEP", 64)
    monkeypatch.setattr(_xla_lanes, "DECODE_LANES", 8)
    monkeypatch.setattr(_xla_lanes, "PREFILL_LANES", 2)
    monkeypatch.setattr(_xla_tiles, "KV_TILE", 8)
    monkeypatch.setattr(_xla, "by_platform", lambda *args, cuda, **_: cuda(*args))
    jax.clear_caches()
    yield
    jax.clear_caches()


def filled_view(quantizer, seed=0):
    view = qpaged.PagedAttentionCacheView.fresh(
        None,
        jnp.float32,
        qpaged.PagedAttentionCacheMetaData(4, 1, PAGES, 16, 64, PAGE_SIZE, KV_HEADS, HEAD_DIM, 0.5),
        0,
        None,
        quantizer,
    )
    rng = np.random.default_rng(seed)
    table = rng.permutation(PAGES).reshape(4, 16).astype(np.int32)
    for pages in table:
        key, value = rng.standard_normal((2, 64, KV_HEADS, HEAD_DIM)).astype(np.float32)
        metadata = qpaged.PagedAttentionMetadata.prefill(position=np.arange(64), page_table=pages)
        view = view.write_prefill_to_cache(key, value, metadata)
    return view, table


@pytest.mark.short(4)
@pytest.mark.parametrize("quantizer", FORMATS)
@pytest.mark.parametrize("options", [{}, {"sliding_window": 9}, {"logits_soft_cap": 3.0}], ids=str)
def test_decode_rows(quantizer, options):
    view, table = filled_view(quantizer)
    metadata = qpaged.PagedAttentionMetadata.decode(position=np.array([63, 0, -1, 21]), page_table=table)
    query = np.random.default_rng(1).standard_normal((4, Q_HEADS, HEAD_DIM)).astype(np.float32)
    check_against_reference(query, view, metadata, options)


@pytest.mark.short(2)
@pytest.mark.parametrize("quantizer", FORMATS)
@pytest.mark.parametrize("options", [{}, {"sliding_window": 9}], ids=str)
def test_a_prefill_of_more_query_tiles_than_lanes(monkeypatch, quantizer, options):
    monkeypatch.setattr(_xla_tiles, "Q_TILE", 4)
    view, table = filled_view(quantizer)
    position = np.concatenate([np.arange(40, 58), np.full(3, -1)])
    metadata = qpaged.PagedAttentionMetadata.prefill(position=position, page_table=table[1])
    query = np.random.default_rng(2).standard_normal((21, Q_HEADS, HEAD_DIM)).astype(np.float32)
    check_against_reference(query, view, metadata, options)


def test_pages_that_no_one_sees_are_not_read():
    view, table = filled_view("plain")
    table[3, 6:] = -1
    poisoned = np.setdiff1d(np.arange(PAGES), table[0, :6])
    keys, values = (pages.at[:, poisoned].set(jnp.nan) for pages in (view.key_pages, view.value_pages))
    view = view.replace(key_pages=keys, value_pages=values)
    metadata = qpaged.PagedAttentionMetadata.decode(position=np.array([20, -1, -1, -1]), page_table=table)
    query = np.ones((4, Q_HEADS, HEAD_DIM), np.float32)
    assert np.isfinite(qpaged.paged_attention(query, view, metadata, backend="xla")).all()


def check_against_reference(query, view, metadata, options):
    out, lse = qpaged.paged_attention(query, view, metadata, backend="xla", return_lse=True, **options)
    expected = qpaged.paged_attention(query, view, metadata, backend="reference", return_lse=True, **options)
    np.testing.assert_allclose(out, expected[0], atol=2e-5)
    np.testing.assert_allclose(lse, expected[1], atol=2e-5)


def test_steps_are_as_few_as_the_lanes_allow():
    steps_for = _xla_lanes.steps_for
    assert steps_for(jnp.array([8, 8, 8, 8]), 8, 4) == 8
    assert steps_for(jnp.array([8, 8, 8, 8]), 8, 16) == 2
    assert steps_for(jnp.array([64, 1, 1, 1]), 64, 11) == 8
    assert steps_for(jnp.array([0, 0]), 4, 2) == 1
