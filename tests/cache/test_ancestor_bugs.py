"""What EasyDeL 0.1.4's paged cache got wrong, one test each: it would fail every one of these."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.caches import (
    HEAD_DIM,
    PAGES,
    SOME,
    attend,
    bits,
    config,
    decode,
    dense,
    fresh,
    fresh_cache,
    make_mesh,
    prefill,
    slots,
    tokens,
    tolerance,
    used_pages,
    write_decodes,
    write_prefill,
)
from support.formats import FEW

import qpaged
from qpaged.implicit import ImplicitArray, use_implicit_args

TABLE = np.array([3, 1, 5, 7])
ROWS = np.stack([TABLE, [2, 4, 6, 8]])


def filled(format, n=8):
    """A view in which n tokens of a sequence were prefilled, and those tokens."""
    key, value = tokens(8)
    return write_prefill(fresh(format), key, value, prefill(np.arange(8), TABLE, n)), key, value


def stored(format):
    """The class that holds the pages of a format."""
    return jax.Array if format is None else qpaged.QuantizedArray


@pytest.mark.parametrize("format", FEW)
def test_quantized_prefill_works(format):
    view, key, value = filled(format)
    np.testing.assert_allclose(slots(view.key_pages, TABLE)[:8], key, atol=tolerance(format))
    np.testing.assert_allclose(slots(view.value_pages, TABLE)[:8], value, atol=tolerance(format))
    assert isinstance(view.key_pages, stored(format))
    assert isinstance(view.value_pages, stored(format))


@pytest.mark.parametrize("format", FEW)
def test_quantized_decode_works(format):
    key, value = tokens(2, seed=1)
    view = write_decodes(fresh(format), key, value, decode(np.array([0, 5]), ROWS))
    for row, position in enumerate([0, 5]):
        page, slot = ROWS[row, position // 4], position % 4
        for pool, written in ((view.key_pages, key), (view.value_pages, value)):
            np.testing.assert_allclose(dense(pool)[:, page, slot], written[row], atol=tolerance(format))
    assert isinstance(view.key_pages, stored(format))


@pytest.mark.parametrize("format", SOME)
def test_pages_stay_quantized_under_use_implicit_args(format):
    view, _, _ = filled(format)
    key, value = tokens(2, seed=1)
    step = decode(np.array([8, 0]), ROWS)

    @jax.jit
    @use_implicit_args
    def write(pools, key, value, step):
        seen = view.replace(key_pages=pools[0], value_pages=pools[1])
        after = seen.write_decodes_to_cache(key, value, step)
        return after.key_pages, after.value_pages

    pools = write((view.key_pages, view.value_pages), key, value, step)
    assert all(isinstance(pool, stored(format)) for pool in pools)
    assert bits(pools) == bits(write_decodes(view, key, value, step))


@pytest.mark.parametrize("format", [None, *FEW])
def test_a_second_chunk_does_not_overwrite_the_first(format):
    key, value = tokens(8)
    whole = filled(format)[0]
    view = fresh(format)
    for start in (0, 4):
        chunk = np.roll(np.arange(8), -start)  # padded with what the other chunk holds
        view = write_prefill(view, key[chunk], value[chunk], prefill(chunk, TABLE, 4))
    atol = tolerance(format)
    np.testing.assert_allclose(slots(view.key_pages, TABLE)[:8], key, atol=atol)
    assert bits(view) == bits(whole)


@pytest.mark.parametrize("format", [None, *FEW])
def test_padding_is_not_written(format):
    key, value = tokens(8)
    metadata = prefill(np.arange(8), TABLE, 5)
    padded = write_prefill(fresh(format), key, value, metadata)
    key[5:], value[5:] = 1e30, np.nan
    assert bits(write_prefill(fresh(format), key, value, metadata)) == bits(padded)
    assert used_pages(padded.key_pages, fresh(format).key_pages) == [1, 3]
    np.testing.assert_allclose(slots(padded.value_pages, TABLE)[:5], value[:5], atol=tolerance(format))


@pytest.mark.parametrize("format", SOME)
def test_padding_changes_nothing_else_either(format):
    key, value = tokens(8)
    padded = write_prefill(fresh(format), key, value, prefill(np.arange(8), TABLE, 7))
    alone = write_prefill(fresh(format), key[:7], value[:7], prefill(np.arange(7), TABLE))
    assert bits(alone) == bits(padded)


@pytest.mark.parametrize("format", SOME)
def test_a_length_need_not_be_a_multiple_of_the_page_size(format):
    key, value = tokens(7)
    view = write_prefill(fresh(format), key, value, prefill(np.arange(7), TABLE))
    np.testing.assert_allclose(slots(view.key_pages, TABLE)[:7], key, atol=tolerance(format))
    assert used_pages(view.key_pages, fresh(format).key_pages) == [1, 3]


@pytest.mark.parametrize("format", [None, *FEW])
def test_a_position_past_capacity_is_dropped(format):
    view, _, _ = filled(format)
    key, value = tokens(2, seed=1)
    after = write_decodes(view, key, value, decode(np.array([16, 17]), ROWS))
    assert bits(after) == bits(view)
    key, value = tokens(8, seed=1)
    after = write_prefill(view, key, value, prefill(np.arange(16, 24), TABLE))
    assert bits(after) == bits(view)


@pytest.mark.parametrize("format", [None, *FEW])
def test_a_page_of_minus_one_is_dropped(format):
    view, _, _ = filled(format)
    key, value = tokens(2, seed=1)
    after = write_decodes(view, key, value, decode(np.array([8, 0]), np.full((2, 4), -1)))
    assert bits(after) == bits(view)


@pytest.mark.parametrize("format", [None, *FEW])
def test_a_position_of_minus_one_is_dropped(format):
    view, _, _ = filled(format)
    key, value = tokens(2, seed=1)
    after = write_decodes(view, key, value, decode(np.array([-1, -1]), ROWS))
    assert bits(after) == bits(view)


@pytest.mark.parametrize("format", [None, *FEW])
def test_page_20_of_16_is_not_a_page_of_the_next_head(format):
    view, _, _ = filled(format)
    key, value = tokens(2, seed=1)
    after = write_decodes(view, key, value, decode(np.array([0, 5]), np.full((2, 4), PAGES + 4)))
    assert bits(after) == bits(view)
    key, value = tokens(8, seed=1)
    after = write_prefill(view, key, value, prefill(np.arange(8), np.full(4, PAGES + 4)))
    assert bits(after) == bits(view)


@pytest.mark.parametrize("format", [None, *FEW])
def test_arrays_survive_json(format):
    view, _, _ = filled(format)
    back = qpaged.PagedAttentionCacheView.from_json(view.to_json())
    assert bits(back) == bits(view)
    assert jax.tree_util.tree_structure(back) == jax.tree_util.tree_structure(view)
    long = prefill(np.arange(3000), np.arange(2000))  # str() of an array leaves out the middle of so many
    assert bits(qpaged.PagedAttentionMetadata.from_json(long.to_json())) == bits(long)


@pytest.mark.parametrize("format", [None, *FEW])
def test_the_leaves_of_a_cache_are_arrays_only(format):
    leaves = jax.tree_util.tree_leaves(fresh_cache(format))
    assert leaves
    assert all(isinstance(leaf, jax.Array) for leaf in leaves)
    doubled = jax.jit(lambda cache: jax.tree_util.tree_map(lambda leaf: leaf, cache))(fresh_cache(format))
    assert bits(doubled) == bits(fresh_cache(format))
    assert isinstance(doubled.views[1].layer_index, int)


@pytest.mark.parametrize("format", [None, *FEW])
def test_the_configuration_is_hashable_and_static(format):
    made = config(quantizer=qpaged.CacheFormat.of(format), dtype="float32")
    assert hash(made) == hash(config(quantizer=qpaged.CacheFormat.of(format), dtype="float32"))
    traced = []

    def count(pages, metadata):
        traced.append(metadata)
        return pages < metadata.num_pages_per_layer

    jitted = jax.jit(count, static_argnums=1)
    for _ in range(2):
        jitted(3, config(quantizer=qpaged.CacheFormat.of(format), dtype="float32"))
    assert traced == [made]


@pytest.mark.parametrize("format", [None, *FEW])
def test_writes_do_not_mutate(format):
    view, key, value = filled(format)
    before, pools = bits(view), (view.key_pages, view.value_pages)
    for after in (
        write_prefill(view, key, value, prefill(np.arange(8, 16), TABLE)),
        write_decodes(view, key[:2], value[:2], decode(np.array([8, 0]), ROWS)),
    ):
        assert after is not view
        assert bits(after) != before
    assert view.key_pages is pools[0]
    assert view.value_pages is pools[1]
    assert bits(view) == before
    with pytest.raises(dataclasses.FrozenInstanceError):
        view.key_pages = None


def test_writes_outside_jit_do_not_mutate_either():
    view = fresh()
    key, value = tokens(2)
    before = bits(view)
    view.write_decodes_to_cache(key, value, decode(np.array([0, 5]), ROWS))
    assert bits(view) == before


@pytest.mark.parametrize("format", SOME)
def test_what_is_written_is_what_attention_reads(format):
    view, _, value = filled(format, 1)
    out = attend(tokens(8, seed=2)[0], view, prefill(np.arange(8), TABLE, 1))
    np.testing.assert_allclose(out[0], value[0], atol=tolerance(format) + 1e-6)
    assert not np.asarray(out[1:]).any()


def create(mesh=None, **changes):
    arguments = {
        "batch_size": 2,
        "num_hidden_layers": 2,
        "max_sequences": 16,
        "page_size": 4,
        "num_kv_heads": 2,
        "kv_head_dim_size": HEAD_DIM,
        "hbm_utilization": 0.5,
        "dtype": jnp.float32,
    }
    return qpaged.PagedAttentionCacheMetaData.create(mesh, **(arguments | changes))


class Device:
    """What create asks of a device."""

    device_kind = "stand-in"
    process_index = 0

    def __init__(self, **stats):
        self.memory_stats = lambda: stats


PAGE_BYTES = 2 * 2 * 4 * 2 * HEAD_DIM * 4  # of all four pools, float32


def test_create_works_where_devices_do_not_report_their_memory():
    with pytest.warns(qpaged.HostMemoryWarning):
        assert create().num_pages_per_layer > 1


def test_replicas_are_not_capacity():
    alone = create(memory_bytes=20 * PAGE_BYTES)
    replicated = create(make_mesh((8,), ("dp",)), memory_bytes=20 * PAGE_BYTES)
    assert alone.num_pages_per_layer == replicated.num_pages_per_layer == 10


def test_the_budget_is_never_negative(monkeypatch):
    full = Device(bytes_limit=100 * PAGE_BYTES, bytes_in_use=90 * PAGE_BYTES)
    monkeypatch.setattr(jax, "devices", lambda *_: [full])
    with pytest.raises(
        ValueError, match=f"takes {PAGE_BYTES:,} bytes on a device, but the cache may take 0;"
    ):
        create()


@pytest.mark.parametrize("format", FEW)
def test_scales_are_counted(format):
    metadata = create(memory_bytes=100 * PAGE_BYTES, quantizer=format)
    cache = qpaged.PagedAttentionCache.init_cache(None, jnp.float32, metadata, None, format)
    page = cache.nbytes // metadata.num_pages_per_layer
    assert cache.nbytes == sum(leaf.nbytes for leaf in jax.tree_util.tree_leaves(cache))
    assert cache.nbytes <= 50 * PAGE_BYTES < cache.nbytes + page
    pool = cache.views[0].key_pages
    assert isinstance(pool, ImplicitArray)
    scales = sum(part.nbytes for part in (pool.scales, pool.global_scale) if part is not None)
    assert cache.nbytes == 4 * (pool.codes.nbytes + scales)
