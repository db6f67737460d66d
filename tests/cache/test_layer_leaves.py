"""Views whose layer's number is a leaf: one program serves all like layers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.caches import bits, config, decode, make_mesh, tokens

import qpaged

LAYERS = 4
STEP = decode(np.array([1, 6]), np.array([[0, 1], [2, 3]]))
KEY, VALUE = tokens(2)


def cache_of(quantizer, mesh=None):
    metadata = config(num_hidden_layers=LAYERS)
    return qpaged.PagedAttentionCache.init_cache(mesh, jnp.float32, metadata, None, quantizer)


@pytest.mark.short(2)
@pytest.mark.parametrize("mesh", [None, "tp"])
@pytest.mark.parametrize("quantizer", [None, "int8", "int4"])
def test_one_program_writes_every_layer_and_views_keep_their_numbers(quantizer, mesh):
    cache = cache_of(quantizer, None if mesh is None else make_mesh((2,), (mesh,)))
    write = jax.jit(lambda view: view.write_decodes_to_cache(KEY, VALUE, STEP), donate_argnums=0)
    want = [write(view) for view in cache_of(quantizer, None).views[:1]]
    write.clear_cache()
    views = cache.with_layer_leaves().views
    for _ in range(3):
        views = [write(view) for view in views]
    assert write._cache_size() == 1
    assert [int(view.layer_index) for view in views] == [*range(LAYERS)]
    assert bits(views[-1].key_pages) == bits(want[0].key_pages)


def test_layers_are_stacked_for_a_scan():
    cache = cache_of("int8").with_layer_leaves()
    stacked = jax.tree_util.tree_map(lambda *leaves: jnp.stack(leaves), *cache.views)

    def body(total, view):
        return total + view.layer_index, view.write_decodes_to_cache(KEY, VALUE, STEP)

    total, written = jax.lax.scan(body, jnp.int32(0), stacked)
    assert total == sum(range(LAYERS))
    one = jax.jit(body)(jnp.int32(0), cache.views[2])[1]
    third = jax.tree_util.tree_map(lambda leaf: leaf[2], written)
    assert int(third.layer_index) == 2 and bits(third) == bits(one)


def test_stacked_layers_are_to_be_taken_apart_before_they_are_written():
    stacked = jax.tree_util.tree_map(
        lambda *leaves: jnp.stack(leaves), *cache_of("int8").with_layer_leaves().views
    )
    for write in (stacked.to_dict, stacked.to_json, qpaged.PagedAttentionCache([stacked, stacked]).to_json):
        with pytest.raises(
            ValueError, match=r"layer_index has shape \(4,\), as of stacked .* take them apart"
        ):
            write()


def test_leaves_are_printed_wherever_they_are():
    cache = cache_of("int8").with_layer_leaves()
    assert "layers 0 to 3: keys and values int8" in repr(cache)
    traced = []
    jax.jit(lambda cache: traced.append(repr(cache)))(cache)
    assert traced[0].startswith("PagedAttentionCache(4 layers, ") and "int8 float32" in traced[0]
    stacked = jax.tree_util.tree_map(lambda *leaves: jnp.stack(leaves), *cache.views)
    assert "layers [0 1 2 3], [0 1 2 3]: " in repr(qpaged.PagedAttentionCache([stacked, stacked]))


def test_records_hold_the_number():
    cache = cache_of("int8")
    assert cache.with_layer_leaves().to_json() == cache.to_json()
    back = qpaged.PagedAttentionCache.from_json(cache.to_json())
    assert [view.layer_index for view in back.views] == [*range(LAYERS)]


def test_a_scan_over_layers_some_of_which_have_a_window():
    """Each call is compiled with its own window, and a layer's flag chooses."""
    windows = [None, 5, None, 5]
    cache = cache_of("int8")
    key, value = tokens(12)
    query = jnp.repeat(key, 2, axis=1)
    step = qpaged.PagedAttentionMetadata.prefill(position=jnp.arange(12), page_table=jnp.arange(3))
    expected = []
    for view, window in zip(cache.views, windows, strict=True):
        view = view.write_prefill_to_cache(key, value, step)
        expected.append(qpaged.paged_attention(query, view, step, sliding_window=window))

    @jax.jit
    def scanned(stacked, has_window):
        def layer(carry, inputs):
            view, is_windowed = inputs
            view = view.write_prefill_to_cache(key, value, step)
            out = jax.lax.cond(
                is_windowed,
                lambda view: qpaged.paged_attention(query, view, step, sliding_window=5),
                lambda view: qpaged.paged_attention(query, view, step),
                view,
            )
            return carry, out

        return jax.lax.scan(layer, None, (stacked, has_window))[1]

    views = cache.with_layer_leaves().views
    stacked = jax.tree_util.tree_map(lambda *leaves: jnp.stack(leaves), *views)
    out = scanned(stacked, jnp.asarray([window is not None for window in windows]))
    np.testing.assert_allclose(out, jnp.stack(expected), atol=1e-5)
    assert not np.allclose(out[0], out[1], atol=1e-3)
