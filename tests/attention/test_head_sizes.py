"""Values of another head size than keys, and values that lie in the keys: multi-head latent attention."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.arrays import normal
from support.long import first_short

import qpaged

PAGES, PAGE_SIZE, LENGTH = 12, 16, 70
TABLE = np.asarray([7, 3, 9, 1, 5])
FORMATS = [
    None,
    "int8",
    "int4:token+rotate+exact20",
    "int8:token",
    "raw",
    "int6:channel",
    "nvfp4",
    "fp8_e4m3:tensor",
]


def metadata(kv_heads, head_dim, **changes):
    return qpaged.PagedAttentionCacheMetaData(
        batch_size=2,
        num_hidden_layers=2,
        num_pages_per_layer=PAGES,
        num_pages_per_sequence=len(TABLE),
        max_sequences=len(TABLE) * PAGE_SIZE,
        page_size=PAGE_SIZE,
        num_kv_heads=kv_heads,
        kv_head_dim_size=head_dim,
        hbm_utilization=0.9,
        **changes,
    )


def cache_of(format, config):
    return qpaged.PagedAttentionCache.init_cache(None, jnp.float32, config, quantizer=format)


def prefill(length=LENGTH):
    return qpaged.PagedAttentionMetadata.prefill(position=np.arange(length), page_table=TABLE)


def dense(query, key, value, scale):
    """Return the causal attention [tokens, heads, value_dim] of a whole sequence, in float64."""
    query, key, value = (np.asarray(rows, np.float64) for rows in (query, key, value))
    key, value = (np.repeat(rows, query.shape[1] // rows.shape[1], axis=1) for rows in (key, value))
    scores = np.einsum("qhd,shd->hqs", query, key) * scale
    scores = np.where(np.tri(len(query), dtype=bool), scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return np.einsum("hqs,shd->qhd", weights / weights.sum(axis=-1, keepdims=True), value)


def decoded(pages):
    """Return the rows [tokens, heads, channels] that a pool holds of the sequence."""
    slots = qpaged.pools.gather_slots(pages, jnp.asarray(TABLE))
    return np.asarray(qpaged.arrays.to_float32(slots)).swapaxes(0, 1)[:LENGTH]


@pytest.mark.short(3)
@pytest.mark.parametrize("backend", [None, "xla", "reference"])
@pytest.mark.parametrize("format", first_short(3, FORMATS))
def test_values_of_another_head_size(format, backend):
    config = metadata(kv_heads=2, head_dim=192, value_head_dim_size=128)
    view = cache_of(format, config).views[0]
    assert view.value_pages.shape == (2, PAGES, PAGE_SIZE, 128)
    key, value, query = normal(LENGTH, 2, 192), normal(LENGTH, 2, 128, seed=1), normal(LENGTH, 4, 192, seed=2)
    view = view.write_prefill_to_cache(key, value, prefill())
    expected = dense(query, decoded(view.key_pages), decoded(view.value_pages), 192**-0.5)
    out = qpaged.paged_attention(query, view, prefill(), backend=backend)
    assert out.shape == (LENGTH, 4, 128)
    np.testing.assert_allclose(out, expected, atol=2e-5)
    last = qpaged.PagedAttentionMetadata.decode(
        position=[LENGTH - 1, -1], page_table=np.stack([TABLE, TABLE])
    )
    rows = jnp.concatenate([query[-1:], query[:1]])
    out = qpaged.paged_attention(rows, view, last, backend=backend)
    np.testing.assert_allclose(out[0], expected[-1], atol=2e-5)
    assert not np.asarray(out[1]).any()


@pytest.mark.short(3)
@pytest.mark.parametrize("backend", [None, "xla", "reference"])
@pytest.mark.parametrize("format", first_short(3, FORMATS))
def test_values_that_lie_in_the_keys(format, backend):
    config = metadata(kv_heads=1, head_dim=192, value_head_dim_size=128, values_in_keys=True)
    cache = cache_of(format, config)
    view = cache.views[0]
    latent, query = normal(LENGTH, 1, 192), normal(LENGTH, 4, 192, seed=2)
    view = view.write_prefill_to_cache(latent, None, prefill())
    rows = decoded(view.key_pages)
    expected = dense(query, rows, rows[..., :128], 0.1)
    out = qpaged.paged_attention(query, view, prefill(), softmax_scale=0.1, backend=backend)
    assert out.shape == (LENGTH, 4, 128)
    np.testing.assert_allclose(out, expected, atol=2e-5)
    step = qpaged.PagedAttentionMetadata.ragged(
        position=[LENGTH - 2, LENGTH - 1, LENGTH - 1],
        page_tables=np.stack([TABLE, TABLE]),
        starts=[0, 2, 3],
    )
    out = qpaged.paged_attention(
        query[jnp.asarray([-2, -1, -1])], view, step, softmax_scale=0.1, backend=backend
    )
    np.testing.assert_allclose(out, expected[[-2, -1, -1]], atol=2e-5)


def test_a_latent_of_deepseek_has_576_channels_and_is_stored_once():
    config = metadata(kv_heads=1, head_dim=576, value_head_dim_size=512, values_in_keys=True)
    cache = cache_of("int8:token", config)
    assert cache.nbytes == 2 * PAGES * PAGE_SIZE * (576 + 4)
    planned = qpaged.PagedAttentionCacheMetaData.create(
        mesh=None,
        batch_size=2,
        num_hidden_layers=2,
        max_sequences=80,
        page_size=PAGE_SIZE,
        num_kv_heads=1,
        kv_head_dim_size=576,
        hbm_utilization=0.999,
        dtype=jnp.float32,
        quantizer="int8:token",
        memory_bytes=cache.nbytes * 1002 // 1000,
        value_head_dim_size=512,
        values_in_keys=True,
    )
    assert planned.num_pages_per_layer == PAGES
    assert cache_of("int8:token", planned).nbytes == cache.nbytes
    view = cache.views[0].write_prefill_to_cache(normal(LENGTH, 1, 576), None, prefill())
    query = normal(LENGTH, 3, 576, seed=2)
    rows = decoded(view.key_pages)
    out = qpaged.paged_attention(query, view, prefill(), softmax_scale=0.05)
    np.testing.assert_allclose(out, dense(query, rows, rows[..., :512], 0.05), atol=2e-5)
    step = qpaged.PagedAttentionMetadata.decode(position=[LENGTH - 1], page_table=TABLE[None])
    by_backend = [
        qpaged.paged_attention(query[-1:], view, step, softmax_scale=0.05, backend=backend)
        for backend in (None, "xla", "reference")
    ]
    for out in by_backend[1:]:
        np.testing.assert_allclose(out, by_backend[0], atol=2e-5)


@pytest.mark.parametrize("format", ["int8", "int4:token+rotate+exact20"])
def test_new_tokens_whose_values_lie_in_the_keys(format):
    config = metadata(kv_heads=1, head_dim=64, value_head_dim_size=32, values_in_keys=True)
    latent, query = normal(LENGTH, 1, 64), normal(LENGTH, 2, 64, seed=2)
    view = cache_of(format, config).views[0]
    out = qpaged.paged_attention(query, view, prefill(), new=(latent, None))
    np.testing.assert_allclose(out, dense(query, latent, latent[..., :32], 64**-0.5), atol=2e-5)
    with pytest.raises(ValueError, match=r"new\[1\] must be None for a cache whose values lie in the keys"):
        qpaged.paged_attention(query, view, prefill(), new=(latent, latent))


@pytest.mark.short(1)
@pytest.mark.parametrize("format", ["int8:token", None, "int4:token+rotate+exact20"])
def test_such_caches_are_copied_taken_reset_saved_and_recorded(format, tmp_path):
    config = metadata(kv_heads=1, head_dim=64, value_head_dim_size=32, values_in_keys=True)
    cache = cache_of(format, config)
    view = cache.views[0].write_prefill_to_cache(normal(LENGTH, 1, 64), None, prefill())
    cache = cache.replace(views=[view, cache.views[1]])
    query = normal(1, 2, 64, seed=2)

    def attended(cache, table):
        step = qpaged.PagedAttentionMetadata.decode(position=[LENGTH - 1], page_table=table[None])
        return np.asarray(qpaged.paged_attention(query, cache.views[0], step, backend="reference"))

    expected = attended(cache, TABLE)
    target = np.asarray([0, 2, 4, 6, 8])
    assert (attended(cache.copy_pages(TABLE, target), target) == expected).all()
    assert (attended(cache.put_pages(target, cache.take_pages(TABLE)), target) == expected).all()
    assert not attended(cache.reset_pages(TABLE), TABLE).any()
    qpaged.save(tmp_path, cache)
    for read in (qpaged.load(tmp_path).cache, qpaged.PagedAttentionCache.from_json(cache.to_json())):
        assert (attended(read, TABLE) == expected).all()
        assert read.views[0].metadata == config
    assert "ValuesInKeys" in repr(view)


def test_what_is_refused():
    with pytest.raises(ValueError, match="must be at most kv_head_dim_size for values that lie in"):
        metadata(1, 64, value_head_dim_size=65, values_in_keys=True)
    with pytest.raises(ValueError, match="value_head_dim_size must be positive, but came as 0"):
        metadata(1, 64, value_head_dim_size=0)
    config = metadata(kv_heads=1, head_dim=64, value_head_dim_size=32, values_in_keys=True)
    view = cache_of("int8", config).views[0]
    rows = normal(LENGTH, 1, 64)
    with pytest.raises(ValueError, match="value must be None for a cache whose values lie in the keys"):
        view.write_prefill_to_cache(rows, rows[..., :32], prefill())
    other = cache_of("int8", metadata(1, 64, value_head_dim_size=32)).views[0]
    with pytest.raises(ValueError, match=r"value must have shape .* = \(70, 1, 32\), but came with shape"):
        other.write_prefill_to_cache(rows, rows, prefill())
    reasons = {each.name: each.reason for each in qpaged.attention_backends(rows, other, prefill())}
    assert "takes keys and values of one head_dim, but they have 64 and 32" in reasons["tpu"]


def test_older_records_are_of_values_like_keys():
    config = metadata(2, 64)
    record = config.to_dict()
    assert not {"value_head_dim_size", "values_in_keys"} & record.keys()
    assert qpaged.PagedAttentionCacheMetaData.from_dict(record) == config
    for wrong in ({"value_head_dim_size": 3.5}, {"values_in_keys": 1}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            qpaged.PagedAttentionCacheMetaData.from_dict(record | wrong)


def test_gradients_of_the_query_with_values_of_another_size():
    config = metadata(2, 64, value_head_dim_size=32)
    view = cache_of(None, config).views[0]
    view = view.write_prefill_to_cache(normal(LENGTH, 2, 64), normal(LENGTH, 2, 32, seed=1), prefill())
    step = dataclasses.replace(prefill())
    gradient = jax.grad(lambda query: qpaged.paged_attention(query, view, step, backend="reference").sum())
    assert np.isfinite(gradient(normal(LENGTH, 2, 64, seed=2))).all()
