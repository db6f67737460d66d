"""Layers whose heads differ in number or size, in one cache."""

import jax.numpy as jnp
import numpy as np
import pytest
from support.arrays import normal

import qpaged
from qpaged import HeadSizes

SIZES = {0: HeadSizes(1, 64, 48), 2: HeadSizes(4, 32)}
OF_LAYERS = [(1, 64, 48), (2, 16, 16), (4, 32, 32), (2, 16, 16)]
TABLE = np.array([3, 0, 5], np.int32)


def create(quantizer="int8:token", memory_bytes=400_000, **changes):
    arguments = {
        "mesh": None, "batch_size": 2, "num_hidden_layers": 4, "max_sequences": 48, "page_size": 16,
        "num_kv_heads": 2, "kv_head_dim_size": 16, "hbm_utilization": 0.999, "dtype": jnp.float32,
        "quantizer": quantizer, "memory_bytes": memory_bytes, "layer_sizes": SIZES,
    }  # fmt: skip
    return qpaged.PagedAttentionCacheMetaData.create(**arguments | changes)


def filled(metadata):
    """Return a cache whose layers hold a prompt, and what each was given."""
    cache = qpaged.PagedAttentionCache.init_cache(None, jnp.float32, metadata, quantizer=metadata.quantizer)
    step = qpaged.PagedAttentionMetadata.prefill(position=np.arange(20), page_table=TABLE)
    given = []
    for layer, (kv_heads, head_dim, value_dim) in enumerate(OF_LAYERS):
        key = normal(20, kv_heads, head_dim, seed=2 * layer)
        value = normal(20, kv_heads, value_dim, seed=2 * layer + 1)
        cache = cache.with_layer(cache.layer(layer).write_to_cache(key, value, step))
        given.append((key, value))
    return cache, step, given


@pytest.mark.short(1)
@pytest.mark.parametrize("quantizer", ["int8:token", "int4:token+rotate+exact16"])
def test_pages_fill_the_memory_to_the_byte(quantizer):
    metadata = create(quantizer)
    cache, _, _ = filled(metadata)
    larger, _, _ = filled(metadata.replace(num_pages_per_layer=metadata.num_pages_per_layer + 1))
    assert cache.nbytes <= int(400_000 * 0.999) < larger.nbytes


def test_every_layer_is_written_and_read_with_its_own_sizes():
    cache, step, given = filled(create())
    for view, (key, value) in zip(cache.views, given, strict=True):
        kv_heads, head_dim = key.shape[1:]
        query = normal(20, 2 * kv_heads, head_dim, seed=9)
        out = qpaged.paged_attention(query, view, step)
        exact = qpaged.paged_attention(query, view, step, new=(key, value))
        assert out.shape == (20, 2 * kv_heads, value.shape[2])
        np.testing.assert_allclose(out, exact, atol=0.05)  # 8 bits of values around 1
        with pytest.raises(ValueError, match="query must have"):
            qpaged.paged_attention(normal(20, 6, head_dim + 1, seed=9), view, step)


def test_pages_are_copied_and_reset_in_every_layer():
    cache, step, _ = filled(create())
    moved = cache.copy_pages(TABLE, [1, 2, 4]).reset_pages(TABLE)
    there = qpaged.PagedAttentionMetadata.prefill(position=np.arange(20), page_table=[1, 2, 4])
    for view, after in zip(cache.views, moved.views, strict=True):
        query = normal(20, view.metadata.num_kv_heads, view.metadata.kv_head_dim_size)
        np.testing.assert_array_equal(
            qpaged.paged_attention(query, after, there), qpaged.paged_attention(query, view, step)
        )
        assert not qpaged.paged_attention(query, after, step).any()


def test_records_and_files_keep_them(tmp_path):
    metadata = create()
    assert type(metadata).from_json(metadata.to_json()) == metadata
    cache, _, _ = filled(metadata)
    again = qpaged.PagedAttentionCache.from_json(cache.to_json())
    assert [view.metadata for view in again.views] == [view.metadata for view in cache.views]
    pytest.importorskip("safetensors")
    allocator = qpaged.PageAllocator(metadata)
    qpaged.save(tmp_path / "cache", cache, allocator)
    loaded = qpaged.load(tmp_path / "cache").cache
    assert [view.metadata for view in loaded.views] == [view.metadata for view in cache.views]


def test_a_cache_tells_the_sizes_of_its_layers():
    metadata = create()
    cache, _, _ = filled(metadata)
    found = [cache.metadata.of_layer(layer) for layer in range(4)]
    assert found == [metadata.of_layer(layer) for layer in range(4)]
    assert [layer for layer, _ in metadata.layer_sizes] == [0, 2]
    assert create(layer_sizes={1: HeadSizes(2, 16)}).layer_sizes == ()  # as all others
    mixed = cache.replace(views=[*cache.views[:3], cache.views[3].replace(metadata=metadata)])
    with pytest.raises(ValueError, match="views must have the same metadata"):
        mixed.check_fields()


@pytest.mark.parametrize(
    ("layer_sizes", "error", "message"),
    [
        ({4: HeadSizes(1, 64)}, ValueError, "layer_sizes must name layers of the model's 4, .* names 4"),
        ({1: HeadSizes(0, 64)}, ValueError, "num_kv_heads of layer 1 must be positive, but came as 0"),
        ({1: HeadSizes(2, 64.5)}, TypeError, "kv_head_dim_size of layer 1 must be an integer"),
        ({1: 64}, TypeError, "layer_sizes must be a mapping from layers to qpaged.HeadSizes, but got"),
        ("int8", TypeError, "layer_sizes must be a mapping .* but got 'int8'; give {5: HeadSizes"),
    ],
)
def test_other_sizes_are_refused(layer_sizes, error, message):
    with pytest.raises(error, match=message):
        create(layer_sizes=layer_sizes)


def test_prefixes_are_found_after_a_load(tmp_path):
    pytest.importorskip("safetensors")
    metadata = create()
    cache, _, _ = filled(metadata)
    allocator = qpaged.PageAllocator(metadata)
    tokens = list(range(32))
    allocator.allocate("a", 32)
    allocator.share_prefix("a", tokens)
    found = allocator.match_prefix("b", tokens)
    cache = cache.apply_changes(allocator.take_changes())
    qpaged.save(tmp_path / "cache", cache, allocator)
    loaded = qpaged.load(tmp_path / "cache").allocator
    assert loaded.match_prefix("c", tokens) == found > 0


def test_a_layer_is_named_once():
    with pytest.raises(ValueError, match="layer_sizes must name each layer once, but names 1 again"):
        create(layer_sizes=((1, HeadSizes(1, 64)), (1, HeadSizes(2, 64))))
