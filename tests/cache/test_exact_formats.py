"""Formats with exact pages: spellings, bytes, records, and errors."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.caches import (
    BATCH,
    HEAD_DIM,
    HEADS,
    SEQUENCE_PAGES,
    bits,
    decode,
    fresh_cache,
    make_view,
    prefill,
)
from support.exact_pages import filled, rows
from support.implicit_arrays import needs_own_implementation

import qpaged
from qpaged import pools


@pytest.mark.parametrize(
    ("spelling", "text"),
    [
        ("int4+exact0", "tokens must be at least 1, but came as 0"),
        ("plain+exact8", "'plain' is no quantizer"),
        ("int4+exact", "no wrapper is named '+exact'"),
        ("int4+sink4+exact8", "no wrapper is named '+sink4'"),
    ],
)
def test_spellings_that_name_no_format(spelling, text):
    with pytest.raises(ValueError, match=re.escape(text)):
        qpaged.CacheFormat.of(spelling)


def test_spellings():
    format = qpaged.CacheFormat.of("int4+rotate+sink4/int8:token+exact128+sink16")
    assert str(format) == "int4+rotate+exact1+sink4/int8:token+exact128+sink16"
    assert qpaged.CacheFormat.from_config(format.config) == format
    key, value = format.layer(0)
    assert (key.window(16), key.sink_pages(16)) == (1, 1)
    assert (value.window(16), value.sink_pages(16)) == (9, 1)


def test_exact_pages_are_counted():
    counts = {"batch_size": 3, "num_hidden_layers": 2, "max_sequences": 64, "page_size": 4}
    counts |= {"num_kv_heads": 2, "kv_head_dim_size": 32, "hbm_utilization": 0.5}
    metadata = qpaged.PagedAttentionCacheMetaData.create(
        None, **counts, dtype="float32", quantizer="int8+exact8+sink4", memory_bytes=2_000_000
    )
    cache = qpaged.PagedAttentionCache.init_cache(None, "float32", metadata, quantizer="int8+exact8+sink4")
    leaves = jax.tree_util.tree_leaves(cache)
    assert cache.nbytes == sum(leaf.nbytes for leaf in leaves) <= 1_000_000
    page = 2 * 2 * (2 * 4 * 32 + 2 * 2)  # codes of a page, and its scales
    assert cache.nbytes + page > 1_000_000
    assert cache.views[0].key_pages.capacity == 3 * 4


@pytest.mark.parametrize("form", ["dict", "json"])
def test_records(form):
    view, _ = filled("int4:channel+offset+exact9/int8+exact1+sink4")
    made = type(view).from_dict(view.to_dict()) if form == "dict" else type(view).from_json(view.to_json())
    assert bits(made) == bits(view) and str(made) == str(view)


def test_records_with_a_page_twice_are_refused():
    record = filled("int4+exact9")[0].to_dict()
    record["key_pages"]["page"] = record["key_pages"]["page"].at[1].set(record["key_pages"]["page"][0])
    with pytest.raises(ValueError, match=r"page must name each of the 16 pages once at most, but came as \["):
        qpaged.PagedAttentionCacheView.from_dict(record)


def test_it_says_what_it_is():
    view = make_view("int8+exact8/int4")
    assert repr(view) == (
        "PagedAttentionCacheView(layer 0, keys int8+exact9 float32[2,16,4,32], "
        "values int4 float32[2,16,4,32])"
    )


@needs_own_implementation
def test_adopt_has_no_static_scales():
    def step(x, position, cache):
        cache = jax.lax.dynamic_update_slice(cache, x, (0, position, 0))
        return jnp.einsum("btd,bsd->bts", x, cache), cache

    example = jnp.ones((2, 1, 32)), jnp.int32(0), jnp.zeros((2, 32, 32))
    message = "whose scales are static; take another granularity, as fp8_e4m3:token, or keep the cache in"
    with pytest.raises(ValueError, match=message):
        qpaged.adopt.quantize_cache(step, "fp8_e4m3:tensor", example=example)


def test_pages_need_the_tables_of_their_tokens():
    view = make_view("int4+exact8")
    mapping = (jnp.zeros(1, jnp.int32), jnp.zeros(1, jnp.int32))
    with pytest.raises(TypeError, match="slot_mapping must have the logical pages and page tables"):
        pools.write_slots(view.key_pages, mapping, jnp.zeros((1, HEADS, HEAD_DIM)))


def test_lengths_are_as_many_as_pages():
    with pytest.raises(ValueError, match="pages and lengths must be as many, but came with 2 and 1"):
        make_view("int4+exact8").pack_pages([1, 2], [4])


def test_a_cache_packs_the_pages_of_every_layer():
    cache = fresh_cache("int4+exact8")
    key, step = rows(np.random.default_rng(0), 5), prefill(np.arange(5), np.array([3, 1]))
    cache = cache.replace(views=[view.write_prefill_to_cache(key, key, step) for view in cache.views])
    packed = cache.pack_pages([3, 1], [4, 1])
    pages = jnp.array([3, 1])
    for before, after in zip(cache.views, packed.views, strict=True):
        assert pools.is_exact(before.value_pages, pages).all()
        assert not pools.is_exact(after.value_pages, pages).any()
        assert bits(after) == bits(before.pack_pages([3, 1], [4, 1]))


def test_memory_does_not_grow_with_the_pool():
    sizes = []
    for pages in (512, 32768):
        view = jax.eval_shape(functools.partial(make_view, "int4+exact8", num_pages_per_layer=pages))
        key = jax.ShapeDtypeStruct((BATCH, HEADS, HEAD_DIM), jnp.float32)
        query = jax.ShapeDtypeStruct((BATCH, 4, HEAD_DIM), jnp.float32)
        step = decode(jnp.zeros(BATCH, jnp.int32), jnp.zeros((BATCH, SEQUENCE_PAGES), jnp.int32))

        def write_and_attend(view, key, query, step):
            view = view.write_decodes_to_cache(key, key, step)
            return qpaged.paged_attention(query, view, step), view

        program = jax.jit(write_and_attend, donate_argnums=0).lower(view, key, query, step).compile()
        sizes.append(program.memory_analysis().temp_size_in_bytes)
    assert sizes[1] <= sizes[0]


def test_no_more_pages_are_exact_than_a_sequence_has():
    pages = make_view("int8+exact100000+sink9").key_pages
    assert (pages.window, pages.sinks, pages.capacity) == (SEQUENCE_PAGES, 0, BATCH * SEQUENCE_PAGES)


def test_too_little_memory_for_exact_pages():
    counts = {"batch_size": 9, "num_hidden_layers": 2, "max_sequences": 64, "page_size": 4}
    counts |= {"num_kv_heads": 2, "kv_head_dim_size": 32, "hbm_utilization": 0.5}
    text = r"one page of 2 layers takes 1,040 bytes on a device, and exact pages of 9 sequences [0-9,]+, but"
    with pytest.raises(ValueError, match=text):
        qpaged.PagedAttentionCacheMetaData.create(
            None, **counts, quantizer="int8+exact8", memory_bytes=40_000
        )
