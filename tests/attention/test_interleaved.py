"""Pools of engines for TPUs, keys and values in one array: written, read and moved as they are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.arrays import normal

import qpaged
from qpaged import interop

PAGES, PAGE_SIZE, LENGTH = 9, 8, 19
TABLE = np.array([5, 2, 7, PAGES])
SCALES = {"float8_e4m3fn": (0.02, 0.013), "float8_e5m2": (1.0, 1.0), "int8": (0.03, 0.02)}
STORED = ["bfloat16", "float32", "float8_e4m3fn", "float8_e5m2", "int8"]


def config(kv_heads=3, head_dim=64, **changes):
    sizes = {
        "batch_size": 2, "num_hidden_layers": 1, "num_pages_per_layer": PAGES, "num_pages_per_sequence": 4,
        "max_sequences": 32, "page_size": PAGE_SIZE, "num_kv_heads": kv_heads, "kv_head_dim_size": head_dim,
        "hbm_utilization": 0.5,
    }  # fmt: skip
    return qpaged.PagedAttentionCacheMetaData(**sizes | changes)


def view_of(stored, metadata=None, pages=None):
    metadata = config() if metadata is None else metadata
    k_scale, v_scale = SCALES.get(stored, (None, None))
    pages = jnp.zeros(interop.interleaved_shape(metadata, stored), stored) if pages is None else pages
    return interop.interleaved_view(pages, metadata, dtype=jnp.float32, k_scale=k_scale, v_scale=v_scale)


def prompt(table=TABLE):
    return qpaged.PagedAttentionMetadata.prefill(position=np.arange(LENGTH), page_table=table)


def rows(metadata):
    shape = LENGTH, metadata.num_kv_heads, metadata.kv_head_dim_size
    return normal(*shape, seed=1), normal(*shape, seed=2)


def stored_row(row, stored, scale):
    """Return a row as the engine's own kernels read it, in float32: the nearest number times the scale."""
    if scale is None:
        return np.asarray(row.astype(stored), np.float32)
    scaled = np.asarray(row, np.float32) / np.float32(scale)
    largest = 127 if stored == "int8" else float(jnp.finfo(stored).max)
    scaled = np.clip(np.round(scaled) if stored == "int8" else scaled, -largest, largest)
    return np.asarray(jnp.asarray(scaled).astype(stored), np.float32) * np.float32(scale)


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize(("kv_heads", "head_dim"), [(3, 64), (1, 128), (8, 160)])
def test_rows_lie_where_the_engines_look_for_them(stored, kv_heads, head_dim):
    metadata = config(kv_heads, head_dim)
    view = view_of(stored, metadata)
    key, value = rows(metadata)
    written = jax.jit(qpaged.PagedAttentionCacheView.write_to_cache)(view, key, value, prompt())
    pages = np.asarray(written.key_pages.pages.astype(jnp.float32))
    packing = 4 // jnp.dtype(stored).itemsize
    assert pages.shape == (PAGES, PAGE_SIZE, -(-2 * kv_heads // packing), packing, -(-head_dim // 128) * 128)
    heads = pages.reshape(PAGES, PAGE_SIZE, -1, pages.shape[-1])
    for side, of_side in enumerate((key, value)):
        scale = None if stored not in SCALES else SCALES[stored][side]
        for token in (0, 7, 8, LENGTH - 1):
            slot = heads[TABLE[token // PAGE_SIZE], token % PAGE_SIZE]
            found = slot[side : 2 * kv_heads : 2, :head_dim] * np.float32(1 if scale is None else scale)
            np.testing.assert_array_equal(found, stored_row(of_side[token], stored, scale))
    assert not heads[[0, 1, 3]].any() and not heads[..., 2 * kv_heads :, :].any()
    assert not heads[..., head_dim:].any()


@pytest.mark.short(4)
@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("backend", [None, "reference"])
def test_attention_reads_what_lies_there(stored, backend):
    metadata = config()
    key, value = rows(metadata)
    view = view_of(stored).write_to_cache(key, value, prompt())
    plain = qpaged.PagedAttentionCacheView.init(None, jnp.float32, metadata, 0)
    scales = SCALES.get(stored, (None, None))
    held = [stored_row(of_side, stored, scale) for of_side, scale in zip((key, value), scales, strict=True)]
    plain = plain.write_to_cache(*held, prompt())
    query = normal(LENGTH, 6, 64, seed=3)
    want = qpaged.paged_attention(query, plain, prompt())
    out = qpaged.paged_attention(query, view, prompt(), backend=backend)
    np.testing.assert_allclose(out, want, rtol=1e-5, atol=1e-5)
    decode = qpaged.PagedAttentionMetadata.decode(
        position=[LENGTH - 1, -1], page_table=np.stack([TABLE, TABLE])
    )
    out = qpaged.paged_attention(query[-2:][::-1], view, decode, backend=backend)
    np.testing.assert_allclose(out[0], want[-1], rtol=1e-5, atol=1e-5)
    assert not out[1].any()


def test_pages_are_moved_bit_for_bit():
    view = view_of("float8_e4m3fn").write_to_cache(*rows(config()), prompt())
    query = normal(LENGTH, 6, 64, seed=3)
    want = qpaged.paged_attention(query, view, prompt())
    there = np.array([0, 8, 3, PAGES])
    moved = view.copy_pages(TABLE, there).reset_pages(TABLE)
    np.testing.assert_array_equal(qpaged.paged_attention(query, moved, prompt(there)), want)
    assert not qpaged.paged_attention(query, moved, prompt()).any()
    put = view_of("float8_e4m3fn").put_pages(there, view.take_pages(TABLE))
    np.testing.assert_array_equal(qpaged.paged_attention(query, put, prompt(there)), want)


def test_pages_of_other_codes_are_not_put():
    view = view_of("int8").write_to_cache(*rows(config()), prompt())
    for other in ("float8_e4m3fn", "float32"):
        with pytest.raises(ValueError, match="taken must be pages of the same kind"):
            view_of(other).put_pages(TABLE, view.take_pages(TABLE))


def test_tokens_that_have_no_page_are_dropped():
    view = view_of("bfloat16")
    step = qpaged.PagedAttentionMetadata.decode(
        position=[31, -1, 100], page_table=np.stack([TABLE, TABLE, TABLE])
    )
    written = view.write_to_cache(*(row[:3] for row in rows(config())), step)
    assert not np.asarray(written.key_pages.pages, np.float32).any()


def test_values_are_not_numbers_where_they_were_not():
    key, value = rows(config())
    view = view_of("int8").write_to_cache(key.at[3].set(jnp.nan).at[4].set(1e9), value, prompt())
    held = view.key_pages.gather_slots(jnp.asarray(TABLE))[:, :LENGTH]
    assert not held[:, 3].any()
    np.testing.assert_allclose(held[:, 4], 127 * 0.03, rtol=1e-6)


FAULTS = [
    (
        {"pages": jnp.zeros((PAGES, PAGE_SIZE, 3, 2, 64), jnp.bfloat16)},
        r"pages must have shape \(9, 8, 3, 2, 128\)",
    ),
    (
        {"pages": jnp.zeros((PAGES, PAGE_SIZE, 3, 2, 128), jnp.int16)},
        "dtype must be one of bfloat16, .* int16",
    ),
    ({"k_scale": 1.0}, "k_scale and v_scale must be left out for pools of floats, but came as 1.0 and None"),
    (
        {"pages": jnp.zeros((PAGES, PAGE_SIZE, 2, 4, 128), jnp.int8), "k_scale": 1.0},
        "k_scale and v_scale must both be given for pools of 8 bits, .* 1.0 and None for int8; give 1.0",
    ),
    (
        {"pages": jnp.zeros((PAGES, PAGE_SIZE, 2, 4, 128), jnp.int8), "k_scale": 0.0, "v_scale": 1.0},
        r"k_scale and v_scale must be positive and finite, but came as \[0.0, 1.0\]",
    ),
    (
        {"pages": jnp.zeros((PAGES, PAGE_SIZE, 2, 4, 128), jnp.int8), "k_scale": [1.0], "v_scale": [1.0]},
        r"k_scale and v_scale must be one number each, but came with shape \(1,\)",
    ),
]


OTHER_VALUES = [
    {"values_in_keys": True, "value_head_dim_size": 32},
    {"value_head_dim_size": 32},
]


@pytest.mark.parametrize("changes", OTHER_VALUES)
def test_values_of_another_size_are_refused(changes):
    pages = jnp.zeros((PAGES, PAGE_SIZE, 3, 2, 128), jnp.bfloat16)
    with pytest.raises(ValueError, match=r"metadata must be of values of the keys' head size, .* 32"):
        interop.interleaved_view(pages, config(**changes))
    with pytest.raises(ValueError, match="layer_index must be one of the 1 layers"):
        interop.interleaved_view(pages, config(), layer_index=99)


@pytest.mark.parametrize(("arguments", "message"), FAULTS)
def test_other_pools_are_refused(arguments, message):
    pages = jnp.zeros((PAGES, PAGE_SIZE, 3, 2, 128), jnp.bfloat16)
    with pytest.raises(ValueError, match=message):
        interop.interleaved_view(**{"pages": pages, "metadata": config()} | arguments)


def test_keys_alone_are_not_written():
    with pytest.raises(TypeError, match="keys and values in one array are written together"):
        qpaged.pools.write_slots(
            view_of("bfloat16").key_pages, (jnp.zeros(1, int), jnp.zeros(1, int)), jnp.zeros((1, 3, 64))
        )
