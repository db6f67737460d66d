"""Times what formats of few bits cost: pages quantized whole, as beside exact ones, and a step that reads.

    python benchmarks/packing.py --out benchmarks/results/packing.json

Pages have 64 slots of 8 KV heads of 128 channels. ``elements_per_second`` are of gaussian pages that are
quantized; ``milliseconds`` are those of a decode step of 8 sequences of 4,096 tokens with 32 query heads, on
the default backend, of formats that a cache can have on both sides. Both are medians over rounds in which all
formats take turns.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from record import circumstances, save

import qpaged

FORMATS = (
    "int8:token",
    "int4:channel+offset",
    "int4:token+rotate",
    "lloyd2+rotate",
    "trellis2+rotate",
    "trellis3+rotate",
    "int4:token/trellis2+rotate",
    "trellis2:channel",
    "trellis3:channel",
)
PAGES, PAGE_SIZE, KV_HEADS, HEAD_DIM = 8, 64, 8, 128
SEQUENCES, TOKENS, Q_HEADS = 8, 4096, 32


def packing(spelling: str) -> Callable[[], Any]:
    """Return a call that quantizes pages."""
    shape = KV_HEADS, PAGES, PAGE_SIZE, HEAD_DIM
    pages = jnp.asarray(np.random.default_rng(0).standard_normal(shape, np.float32))
    quantize = jax.jit(qpaged.get_quantizer(spelling).of_whole_blocks.quantize)
    return lambda: quantize(pages)


def reading(spelling: str) -> Callable[[], Any]:
    """Return a call that attends over a cache, whose pages lie in any order."""
    of_sequence = TOKENS // PAGE_SIZE
    num_pages = SEQUENCES * of_sequence
    config = qpaged.PagedAttentionCacheMetaData(
        SEQUENCES, 1, num_pages, of_sequence, TOKENS, PAGE_SIZE, KV_HEADS, HEAD_DIM, 0.5
    )
    view = qpaged.PagedAttentionCache.init_cache(None, jnp.bfloat16, config, None, spelling).views[0]
    generator = np.random.default_rng(0)
    table = generator.permutation(num_pages).astype(np.int32).reshape(SEQUENCES, of_sequence)
    last = np.full(SEQUENCES, TOKENS - 1, np.int32)
    metadata = qpaged.PagedAttentionMetadata.decode(position=last, page_table=table)
    query = jnp.asarray(generator.standard_normal((SEQUENCES, Q_HEADS, HEAD_DIM), np.float32))
    attend = jax.jit(qpaged.paged_attention)
    return lambda: attend(query, view, metadata)


def take_turns(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Return the median seconds of each call."""
    for call in calls.values():
        jax.block_until_ready(call())
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            jax.block_until_ready(call())
            times[name].append(time.perf_counter() - start)
    return {name: median(took) for name, took in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="where to save the times")
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    of_one_side = [spelling for spelling in FORMATS if "/" not in spelling]
    of_both = [spelling for spelling in FORMATS if "channel" not in spelling]
    packed = take_turns({spelling: packing(spelling) for spelling in of_one_side}, arguments.rounds // 2)
    read = take_turns({spelling: reading(spelling) for spelling in of_both}, arguments.rounds)
    elements = KV_HEADS * PAGES * PAGE_SIZE * HEAD_DIM
    runs = []
    for spelling in FORMATS:
        run: dict[str, Any] = {"format": spelling}
        if spelling in packed:
            run["elements_per_second"] = elements / packed[spelling]
        if spelling in read:
            run["milliseconds"] = 1e3 * read[spelling]
        print(run, flush=True)
        runs.append(run)
    save(arguments.out, {**circumstances(), "runs": runs})


if __name__ == "__main__":
    main()
