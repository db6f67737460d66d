"""What is printed of a cache, its views, pools and pages fits on a screen."""

import jax
import jax.numpy as jnp
from support.caches import config, fresh, fresh_cache

import qpaged


def test_a_cache_of_several_formats_has_a_line_for_each():
    metadata = config(num_hidden_layers=32)
    format = qpaged.CacheFormat.of("int8/int4:token").with_layers({1: "raw", 30: "raw"})
    text = repr(qpaged.PagedAttentionCache.init_cache(None, jnp.float32, metadata, None, format))
    head, first, second = text.splitlines()
    assert head.startswith("PagedAttentionCache(32 layers, ") and head.endswith(" bytes")
    layers = ", ".join(str(layer) for layer in range(32) if layer not in (1, 30))
    assert first == f"    layers {layers}: keys int8 float32[2,16,4,32], values int4:token float32[2,16,4,32]"
    assert second == "    layers 1, 30: keys and values raw float32[2,16,4,32])"


def test_layers_that_are_all_alike_are_a_run():
    assert "layers 0 to 1: keys and values plain float32[2,16,4,32])" in repr(fresh_cache())


def test_a_view_and_a_pool_name_format_and_shape():
    assert repr(fresh("int8")) == "PagedAttentionCacheView(layer 0, keys and values int8 float32[2,16,4,32])"
    assert repr(fresh("int8:token").key_pages) == (
        "QuantizedArray(int8:token float32[2,16,4,32]: codes int8[2,16,4,32], scales float32[2,16,4,1])"
    )


def test_trees_of_other_things_are_printed_too():
    cache = fresh_cache("int8")
    for tree in (
        jax.eval_shape(lambda: cache),
        jax.tree_util.tree_map(lambda leaf: None, cache),
        jax.tree_util.tree_map(lambda leaf: "name", cache),
    ):
        assert len(repr(tree)) < 1000
