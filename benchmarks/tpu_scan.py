"""Compiles a scan over layers for TPUs without a TPU, and records the temporaries of what carries the cache.

    python benchmarks/tpu_scan.py --out benchmarks/results/tpu_scan.json

At each of 4 layers a decode step of 8 sequences of up to 4096 tokens is written and attended to, as
``tpu_compile.py`` has it. ``flat`` carries a flat cache (``init_cache(..., flat=True)``) of 1024 pages a
layer, ``flat_large`` one of 16,384. ``stacked`` takes the views of 1024 pages as the scan's xs, and stacks
what they become. Bytes are those of the program's temporaries in HBM. Needs libtpu.
"""

import argparse
import json
from pathlib import Path

import jax
import jax.numpy as jnp
from record import circumstances, save
from tpu_compile import (
    CHIPS,
    HEAD_DIM,
    KV_HEADS,
    PAGE_SIZE,
    Q_HEADS,
    SEQUENCES,
    TOKENS,
    abstract_step,
    array,
    chip_sharding,
    compiled_memory,
)

import qpaged

LAYERS, SMALL, LARGE = 4, 1024, 16_384
FORMATS = "plain", "raw", "int8", "int8:token", "int8:channel", "int4:token", "int4:token+exact128"


def config_of(pages: int) -> qpaged.PagedAttentionCacheMetaData:
    """Return the configuration of a cache with so many pages a layer."""
    return qpaged.PagedAttentionCacheMetaData(
        SEQUENCES, LAYERS, pages, TOKENS // PAGE_SIZE, TOKENS, PAGE_SIZE, KV_HEADS, HEAD_DIM, 0.5
    )


def flat_cache(quantizer: str, pages: int) -> qpaged.PagedAttentionCache:
    """Return a flat cache without allocating it."""
    init = qpaged.PagedAttentionCache.init_cache
    return jax.eval_shape(lambda: init(None, jnp.bfloat16, config_of(pages), quantizer=quantizer, flat=True))


def stacked_views(quantizer: str) -> qpaged.PagedAttentionCacheView:
    """Return the views of all layers, stacked, without allocating them."""
    init = qpaged.PagedAttentionCache.init_cache

    def make() -> qpaged.PagedAttentionCacheView:
        views = init(None, jnp.bfloat16, config_of(SMALL), quantizer=quantizer).with_layer_leaves().views
        return jax.tree_util.tree_map(lambda *leaves: jnp.stack(leaves), *views)

    return jax.eval_shape(make)


def scan_flat(cache, query, rows, step):
    def block(cache, layer):
        view = cache.layer(layer).write_to_cache(rows, rows, step)
        return cache.with_layer(view), qpaged.paged_attention(query, view, step)

    return jax.lax.scan(block, cache, jnp.arange(LAYERS))


def scan_stacked(views, query, rows, step):
    def block(carry, view):
        view = view.write_to_cache(rows, rows, step)
        return carry, (view, qpaged.paged_attention(query, view, step))

    return jax.lax.scan(block, 0, views)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="write the results here as JSON")
    parser.add_argument("--chips", nargs="+", choices=CHIPS, default=list(CHIPS))
    parser.add_argument("--formats", nargs="+", default=list(FORMATS))
    arguments = parser.parse_args()
    query = array(SEQUENCES, Q_HEADS, HEAD_DIM, dtype=jnp.bfloat16)
    rows = array(SEQUENCES, KV_HEADS, HEAD_DIM, dtype=jnp.bfloat16)
    step = abstract_step(PAGE_SIZE, ragged=False)
    runs = []
    for name in arguments.chips:
        chip = chip_sharding(name)
        for quantizer in arguments.formats:
            caches = {
                "flat": (scan_flat, flat_cache(quantizer, SMALL)),
                "flat_large": (scan_flat, flat_cache(quantizer, LARGE)),
                "stacked": (scan_stacked, stacked_views(quantizer)),
            }
            temporaries = {
                kind: compiled_memory(
                    scan, chip, cache, query, rows, step, donate_argnums=0
                ).temp_size_in_bytes
                for kind, (scan, cache) in caches.items()
            }
            runs.append({"chip": name, "format": quantizer, **temporaries})
            print(json.dumps(runs[-1]), flush=True)
    shape = {
        "layers": LAYERS, "sequences": SEQUENCES, "tokens": TOKENS, "q_heads": Q_HEADS, "kv_heads": KV_HEADS,
        "head_dim": HEAD_DIM, "page_size": PAGE_SIZE, "pages": [SMALL, LARGE],
    }  # fmt: skip
    save(arguments.out, {**circumstances(["libtpu"]), "shape": shape, "runs": runs})


if __name__ == "__main__":
    main()
