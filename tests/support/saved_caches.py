"""Small caches with an allocator, for what is saved and loaded."""

import functools

import jax
import numpy as np

import qpaged
from support.arrays import normal
from support.caches import narrow_floats_allowed

PAGES, PAGE_SIZE, HEADS, HEAD_DIM = 9, 16, 2, 64
LENGTHS = {"a": 40, ("b", 3): 10}


def metadata(layers=2, **changes):
    counts = {
        "batch_size": 2,
        "num_hidden_layers": layers,
        "num_pages_per_layer": PAGES,
        "num_pages_per_sequence": 4,
        "max_sequences": 4 * PAGE_SIZE,
        "page_size": PAGE_SIZE,
        "num_kv_heads": HEADS,
        "kv_head_dim_size": HEAD_DIM,
        "hbm_utilization": 0.9,
    }
    return qpaged.PagedAttentionCacheMetaData(**(counts | changes))


def fresh(format, dtype=np.float32, **changes):
    with narrow_floats_allowed():
        return qpaged.PagedAttentionCache.init_cache(None, dtype, metadata(**changes), quantizer=format)


def filled(format, dtype=np.float32, seed=0, **changes):
    """Return a cache of a format with two sequences, and its allocator."""
    cache = fresh(format, dtype, **changes)
    config = cache.views[0].metadata
    allocator = qpaged.PageAllocator(config, salt="model")
    for name, length in LENGTHS.items():
        allocator.allocate(name, length)
    cache = cache.apply_changes(allocator.take_changes())
    for row, (name, length) in enumerate(LENGTHS.items()):
        step = qpaged.PagedAttentionMetadata.prefill(
            position=np.arange(length), page_table=allocator.page_table([name])[0]
        )
        views = []
        for view in cache.views:
            key, value = (
                normal(length, config.num_kv_heads, config.kv_head_dim_size, seed=seed + 2 * row + side)
                for side in range(2)
            )
            views.append(_write(view, key, value, step))
        cache = cache.replace(views=views)
    allocator.share_prefix("a", range(40))
    return cache, allocator


def same_bits(one, other):
    """Return True if two caches have the same arrays, bit for bit."""
    if jax.tree_util.tree_structure(one) != jax.tree_util.tree_structure(other):
        return False
    pairs = zip(jax.tree_util.tree_leaves(one), jax.tree_util.tree_leaves(other), strict=True)
    return all(a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in pairs)


@functools.partial(jax.jit, donate_argnums=0)
def _write(view, key, value, step):
    return view.write_prefill_to_cache(key, value, step)
