"""Compiles writes and reads of engines' own pools for TPUs without a TPU, and records their temporaries.

    python benchmarks/tpu_interleaved.py --out benchmarks/results/tpu_interleaved.json

The pools are those of ``qpaged.interop.interleaved_view``, of 1024 pages and of 65,536. A decode step of 8
sequences of up to 4096 tokens is written, and attended to, and 8 pages are copied. Bytes are those of the
programs' temporaries in HBM. Needs libtpu.
"""

import argparse
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from record import circumstances, save
from tpu_compile import (
    CHIPS,
    HEAD_DIM,
    KV_HEADS,
    LARGE,
    PAGE_SIZE,
    Q_HEADS,
    SEQUENCES,
    SMALL,
    TOKENS,
    abstract_step,
    array,
    chip_sharding,
    compiled_memory,
    write,
)

import qpaged
from qpaged import interop

STORED = "bfloat16", "float8_e4m3fn", "int8"


def abstract_view(stored: str, pages: int) -> qpaged.PagedAttentionCacheView:
    """Return a view of an engine's pool without allocating it."""
    config = qpaged.PagedAttentionCacheMetaData(
        SEQUENCES, 1, pages, TOKENS // PAGE_SIZE, TOKENS, PAGE_SIZE, KV_HEADS, HEAD_DIM, 0.5
    )
    scales = {} if stored == "bfloat16" else {"k_scale": 0.02, "v_scale": 0.02}
    shape = interop.interleaved_shape(config, stored)
    return jax.eval_shape(lambda: interop.interleaved_view(jnp.zeros(shape, stored), config, **scales))


def copy(view):
    return view.copy_pages(np.arange(8), np.arange(8, 16))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="write the results here as JSON")
    parser.add_argument("--chips", nargs="+", choices=CHIPS, default=list(CHIPS))
    arguments = parser.parse_args()
    query = array(SEQUENCES, Q_HEADS, HEAD_DIM, dtype=jnp.bfloat16)
    rows = array(SEQUENCES, KV_HEADS, HEAD_DIM, dtype=jnp.bfloat16)
    step = abstract_step(PAGE_SIZE, ragged=False)
    runs = []
    for name in arguments.chips:
        chip = chip_sharding(name)
        for stored in STORED:
            run: dict[str, object] = {"chip": name, "stored": stored}
            for suffix, pages in (("", SMALL), ("_large", LARGE)):
                view = abstract_view(stored, pages)
                memory = {
                    "write": compiled_memory(write, chip, view, rows, step, donate_argnums=0),
                    "attention": compiled_memory(qpaged.paged_attention, chip, query, view, step),
                    "copy": compiled_memory(copy, chip, view, donate_argnums=0),
                }
                run.update({f"{kind}{suffix}": of.temp_size_in_bytes for kind, of in memory.items()})
            runs.append(run)
            print(json.dumps(run), flush=True)
    shape = {
        "sequences": SEQUENCES, "tokens": TOKENS, "q_heads": Q_HEADS, "kv_heads": KV_HEADS,
        "head_dim": HEAD_DIM, "page_size": PAGE_SIZE, "pages": [SMALL, LARGE],
    }  # fmt: skip
    save(arguments.out, {**circumstances(["libtpu"]), "shape": shape, "runs": runs})


if __name__ == "__main__":
    main()
