"""Static scales: given, kept by whatever is written, and carried along."""

import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding
from support.caches import (
    HEADS,
    config,
    decode,
    fresh,
    fresh_cache,
    make_mesh,
    make_view,
    prefill,
    reset,
    tokens,
    write_decodes,
    write_prefill,
)

import qpaged
from qpaged import CacheScales
from qpaged.pools import gather_slots, static_scales

STATIC = ("fp8_e4m3:tensor", "fp8_e4m3:head", "fp8_e5m2:head", "fp8_e4m3:head+rotate", "fp8_e4m3:head+exact4")
TABLE = np.array([3, 1, 5, 7], np.int32)
KEY, VALUE = tokens(8)
SCALES = CacheScales([[0.25, 0.5], [0.75, 0.125]], [2.0, 3.0])


def scales_of(view):
    return [static_scales(pages).reshape(-1).tolist() for pages in (view.key_pages, view.value_pages)]


def given(format, **changes):
    heads = [0.25, 0.5] if ":head" in format else 0.25
    return make_view(format, **changes).with_scales(key=heads, value=0.125)


def test_a_packed_page_is_read_and_opened_under_them():
    view = given("fp8_e4m3:head+exact1")
    view = write_prefill(view, KEY, VALUE, prefill(np.arange(8), TABLE))
    packed = np.asarray(gather_slots(view.key_pages, jnp.array(TABLE[:1])))
    np.testing.assert_allclose(packed.transpose(1, 0, 2), KEY[:4], rtol=2.0**-4, atol=2.0**-11)
    view = write_prefill(view, KEY[1:2], VALUE[1:2], prefill(np.array([1]), TABLE))
    opened = np.asarray(gather_slots(view.key_pages, jnp.array(TABLE[:1])))
    np.testing.assert_array_equal(opened[:, 1], KEY[1])
    np.testing.assert_array_equal(np.delete(opened, 1, axis=1), np.delete(packed, 1, axis=1))


@pytest.mark.parametrize("format", STATIC)
def test_fresh_scales_are_one(format):
    count = HEADS if ":head" in format else 1
    assert scales_of(fresh(format)) == [[1.0] * count] * 2


@pytest.mark.short(2)
@pytest.mark.parametrize("format", STATIC)
def test_writes_resets_and_copies_keep_them(format):
    view = given(format)
    expected = scales_of(view)
    assert expected[0] == ([0.25, 0.5] if ":head" in format else [0.25])
    view = write_prefill(view, KEY * 1e4, VALUE, prefill(np.arange(8), TABLE))
    more = tokens(2, seed=1)
    view = write_decodes(view, *more, decode(np.array([8, -1]), np.stack([TABLE, TABLE])))
    view = jax.jit(qpaged.PagedAttentionCacheView.copy_pages)(view, np.array([3]), np.array([0]))
    assert scales_of(view) == expected
    assert scales_of(reset(view, np.array([3, 0]))) == expected


@pytest.mark.parametrize(
    ("format", "float8"),
    [("fp8_e4m3:head", ml_dtypes.float8_e4m3fn), ("fp8_e5m2:tensor", ml_dtypes.float8_e5m2)],
)
def test_codes_are_values_over_the_scale_rounded_to_nearest_even_and_saturated(format, float8):
    key = np.concatenate([KEY * 10.0**-3, KEY, KEY * 10.0**6]).astype(np.float32)[:8]
    key[0, :, :4] = [[0.0, 1e30, -1e30, 448.0 * 0.25]] * HEADS
    view = write_prefill(given(format), key, VALUE, prefill(np.arange(8), TABLE))
    scale = np.array([[0.25], [0.5]] if ":head" in format else [[0.25]], np.float32)
    largest = float(ml_dtypes.finfo(float8).max)
    expected = np.clip(key / scale, -largest, largest).astype(float8).astype(np.float32) * scale
    written = view.key_pages.materialize()[:, TABLE].reshape(HEADS, -1, key.shape[-1])[:, :8]
    np.testing.assert_array_equal(np.swapaxes(written, 0, 1), expected)


def test_negative_zeros_are_zeros():
    view = write_prefill(
        given("fp8_e4m3:tensor"), -0.0 * KEY, -1e-9 * np.abs(VALUE), prefill(np.arange(8), TABLE)
    )
    assert not np.asarray(view.key_pages.codes).any() and not np.asarray(view.value_pages.codes).any()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_stored_as_other_formats_store_it(bad):
    key = KEY.copy()
    key[2, 1, 5] = bad
    view = write_prefill(given("fp8_e4m3:tensor"), key, VALUE, prefill(np.arange(8), TABLE))
    stored = view.key_pages.materialize()[1, TABLE[0], 2, 5]
    assert stored == (0 if np.isnan(bad) else np.copysign(448 * 0.25, bad))


@pytest.mark.parametrize("format", ["fp8_e4m3:tensor", "fp8_e4m3:head"])
def test_a_cache_takes_the_scales_of_each_layer(format):
    cache = fresh_cache(format).with_scales(SCALES)
    keys = [[0.25, 0.5], [0.75, 0.125]] if ":head" in format else [[0.5], [0.75]]
    count = HEADS if ":head" in format else 1
    expected = [[key, [value] * count] for key, value in zip(keys, (2.0, 3.0), strict=True)]
    assert [scales_of(view) for view in cache.views] == expected


def test_pools_without_static_scales_are_left_alone():
    cache_format = qpaged.CacheFormat.of("fp8_e4m3:head/int8").with_layers({1: "raw"})
    metadata = config(quantizer=cache_format)
    cache = qpaged.PagedAttentionCache.init_cache(None, jnp.float32, metadata, quantizer=cache_format)
    first, second = cache.with_scales(SCALES).views
    assert static_scales(first.key_pages).reshape(-1).tolist() == [0.25, 0.5]
    assert static_scales(first.value_pages) is None
    assert jax.tree_util.tree_all(jax.tree_util.tree_map(jnp.array_equal, second, cache.views[1]))


@pytest.mark.parametrize("format", STATIC)
def test_records_hold_them(format):
    view = write_prefill(given(format), KEY, VALUE, prefill(np.arange(8), TABLE))
    read = type(view).from_json(view.to_json())
    assert scales_of(read) == scales_of(view)
    assert jax.tree_util.tree_all(jax.tree_util.tree_map(jnp.array_equal, read, view))


@pytest.mark.parametrize("format", ["fp8_e4m3:tensor", "fp8_e4m3:head"])
def test_they_are_replicated_or_divided_by_heads(format):
    view = given(format, mesh=make_mesh((2,), ("tp",)))
    scales = view.key_pages.scales
    assert isinstance(scales.sharding, NamedSharding) and len(scales.sharding.device_set) == 2
    assert scales.addressable_shards[0].data.shape == (1, 1, 1, 1)
    metadata = prefill(np.arange(8), TABLE)
    query = tokens(8, seed=3, heads=2 * HEADS)[0]
    attend = jax.jit(qpaged.paged_attention)
    divided, alone = (write_prefill(one, KEY, VALUE, metadata) for one in (view, given(format)))
    np.testing.assert_array_equal(divided.key_pages.codes, alone.key_pages.codes)
    np.testing.assert_allclose(
        attend(query, divided, metadata), attend(query, alone, metadata), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("format", ["fp8_e4m3:tensor", "fp8_e4m3:head"])
def test_layers_that_are_stacked_keep_their_own(format):
    cache = fresh_cache(format).with_scales(SCALES).with_layer_leaves()
    metadata = prefill(np.arange(8), TABLE)

    def layer(carry, view):
        view = view.write_prefill_to_cache(KEY, VALUE, metadata)
        return carry, (view, qpaged.paged_attention(jnp.repeat(KEY, 2, axis=1), view, metadata))

    stacked = jax.tree_util.tree_map(lambda *leaves: jnp.stack(leaves), *cache.views)
    _, (written, out) = jax.jit(lambda views: jax.lax.scan(layer, None, views))(stacked)
    for index, view in enumerate(cache.views):
        _, (alone, attended) = jax.jit(layer)(None, view)
        of_layer = jax.tree_util.tree_map(lambda leaf: leaf[index], written)  # noqa: B023
        assert jax.tree_util.tree_all(jax.tree_util.tree_map(jnp.array_equal, of_layer, alone))
        np.testing.assert_allclose(out[index], attended, rtol=1e-5, atol=1e-6)


def test_scales_may_be_given_within_a_program():
    scaled = jax.jit(lambda view, scale: view.with_scales(key=scale))(
        fresh("fp8_e4m3:head"), jnp.float32([3, 5])
    )
    assert scales_of(scaled) == [[3.0, 5.0], [1.0, 1.0]]


@pytest.mark.parametrize(
    ("format", "scales", "error", "message"),
    [
        ("int8", 1.0, ValueError,
         "key must be None for pages without static scales, but scales came for int8 "
         "float32[2,16,4,32] pages; formats as fp8_e4m3:tensor and fp8_e4m3:head have them."),
        (None, 1.0, ValueError, "but scales came for plain float32[2,16,4,32] pages;"),
        ("fp8_e4m3:tensor", [1.0, 2.0], ValueError,
         "key must be one number for fp8_e4m3:tensor pages, but came with shape (2,); give scales of "
         "this shape."),
        ("fp8_e4m3:head", [1.0] * 3, ValueError,
         "key must be one number, or one for each of the 2 KV heads for fp8_e4m3:head pages, but came "
         "with shape (3,);"),
        ("fp8_e4m3:head", 0.0, ValueError,
         "key must be positive and finite scales, from 2^-110 to 2^112, but 0.0 came; qpaged "
         "calibrate MODEL --text TEXT --out scales.json writes some."),
        ("fp8_e4m3:head", [1.0, -1.0], ValueError, "but -1.0 came;"),
        ("fp8_e4m3:head", np.inf, ValueError, "but inf came;"),
        ("fp8_e4m3:head", np.nan, ValueError, "but nan came;"),
        ("fp8_e4m3:head", "0.5", TypeError,
         "key must be scales, but got '0.5' (their dtype is <U3); give floats."),
    ],
)  # fmt: skip
def test_scales_that_a_pool_cannot_have(format, scales, error, message):
    with pytest.raises(error, match=re.escape(message)):
        fresh(format).with_scales(key=scales)


@pytest.mark.parametrize(
    ("format", "scales", "error", "message"),
    [
        ("int8", SCALES, ValueError,
         "scales must be left out for a cache whose formats have no static ones; make the cache with "
         "such a format, as fp8_e4m3:tensor."),
        ("fp8_e4m3:head", CacheScales([1.0], [1.0]), ValueError,
         "scales must be of the model's 2 layers, but are of 1; read those of this model."),
        ("fp8_e5m2:head", SCALES, ValueError,
         "scales must be chosen for the format of the keys, fp8_e5m2, but are for fp8_e4m3; qpaged "
         "calibrate --format fp8_e5m2:head chooses them."),
        ("fp8_e4m3:head/fp8_e4m3:head+rotate", SCALES, ValueError,
         "of the values, fp8_e4m3+rotate, but are for fp8_e4m3;"),
        ("fp8_e4m3:head", "scales.json", TypeError,
         "scales must be a qpaged.CacheScales, but got 'scales.json'; CacheScales.load and "
         "qpaged.models.read_scales read files."),
    ],
)  # fmt: skip
def test_scales_that_a_cache_cannot_have(format, scales, error, message):
    with pytest.raises(error, match=re.escape(message)):
        fresh_cache(format).with_scales(scales)


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        (
            {"key": 1.0},
            ValueError,
            "key must have shape (layers,) or (layers, kv_heads), but came with shape ();",
        ),
        ({"value": [1.0]}, ValueError, "key and value must be of as many layers, but came with 2 and 1;"),
        (
            {"value": [1.0, 0.0]},
            ValueError,
            "value must be positive and finite scales, from 2^-110 to 2^112,",
        ),
        ({"key": [[1.0], [1.0, 2.0]]}, TypeError, "key must be scales, but got [[1.0], [1.0, 2.0]] ("),
        ({"format": 8}, TypeError, "format must be a string, but got 8; 'fp8_e4m3', say."),
    ],
)
def test_scales_that_are_none(fields, error, message):
    with pytest.raises(error, match=re.escape(message)):
        CacheScales(**({"key": [1.0, 1.0], "value": [1.0, 1.0]} | fields))


def test_scales_survive_their_file(tmp_path):
    path = tmp_path / "scales.json"
    scales = CacheScales(
        np.float32([[0.1, 1 / 3], [2.0**-100, 7.0]]), [0.7, 1e30], "fp8_e5m2+rotate/fp8_e5m2"
    )
    scales.save(path)
    read = CacheScales.load(path)
    assert read.format == scales.format and read.formats == ("fp8_e5m2+rotate", "fp8_e5m2")
    np.testing.assert_array_equal(read.key, scales.key)
    np.testing.assert_array_equal(read.value, scales.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not valid JSON"),
        ("[]", "must hold cache scales of version 1, but does not; qpaged calibrate MODEL"),
        ('{"qpaged": "cache scales", "version": 2}', "must hold cache scales of version 1, but does not;"),
        (
            '{"qpaged": "cache scales", "version": 1, "format": "fp8_e4m3", "key": [0.0], "value": [1.0]}',
            "holds scales that cannot be taken: key must be positive",
        ),
    ],
)
def test_files_that_hold_no_scales(tmp_path, content, message):
    path = tmp_path / "scales.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=re.escape(message)):
        CacheScales.load(path)


def test_a_class_of_a_format_takes_its_own_granularities_alone():
    from quantizers import Fp8E4M3, Fp8E4M3Static

    message = "granularity must not be tensor or head for Fp8E4M3, but came as 'tensor'; qpaged.get_quantizer"
    with pytest.raises(ValueError, match=message):
        Fp8E4M3("tensor")
    with pytest.raises(
        ValueError, match="granularity must be tensor or head for Fp8E4M3Static, but came as 'page'"
    ):
        Fp8E4M3Static()
