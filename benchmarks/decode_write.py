"""Times a donated decode write in a small pool and in a large one; the two should take as long.

    python benchmarks/decode_write.py --out benchmarks/results/decode_write.json

Each installed format writes 8 rows of one layer's keys and values, at 512 and at 32,768 pages of 16 slots,
with 8 heads and head_dim 128. The two sizes take turns in one process; times are medians over rounds.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from record import circumstances, save

import qpaged

HEADS, PAGE_SIZE, HEAD_DIM, BATCH = 8, 16, 128, 8
SIZES = (512, 32_768)
STEPS = 50  # writes timed together in a round


def empty_view(quantizer: str, pages: int) -> qpaged.PagedAttentionCacheView:
    """Return an empty view of ``pages`` pages."""
    per_sequence = SIZES[0] // BATCH
    config = qpaged.PagedAttentionCacheMetaData(
        BATCH, 1, pages, per_sequence, per_sequence * PAGE_SIZE, PAGE_SIZE, HEADS, HEAD_DIM, 0.5
    )
    return qpaged.PagedAttentionCacheView.init(None, jnp.bfloat16, config, 0, None, quantizer)


def decode_steps(pages: int) -> list[qpaged.PagedAttentionMetadata]:
    """Return the metadata of successive decode steps over sequences whose pages are scattered."""
    table = np.random.default_rng(0).permutation(pages)[: SIZES[0]].reshape(BATCH, -1)
    start = np.arange(BATCH) * 37
    return [qpaged.PagedAttentionMetadata.decode(position=start + i, page_table=table) for i in range(STEPS)]


def measure(quantizer: str, rounds: int) -> dict[str, object]:
    """Return the times of a format's writes at both sizes."""
    write = jax.jit(qpaged.PagedAttentionCacheView.write_decodes_to_cache, donate_argnums=0)
    rows = jnp.asarray(np.random.default_rng(1).normal(size=(STEPS, BATCH, HEADS, HEAD_DIM)), jnp.bfloat16)
    steps = list(rows)  # indexing a device array inside the loop would be timed, too
    views = {pages: empty_view(quantizer, pages) for pages in SIZES}
    metadata = {pages: decode_steps(pages) for pages in SIZES}
    times: dict[int, list[float]] = {pages: [] for pages in SIZES}
    for turn in range(rounds + 1):
        for pages in SIZES:
            begin = time.perf_counter()
            for step in range(STEPS):
                views[pages] = write(views[pages], steps[step], steps[step], metadata[pages][step])
            jax.block_until_ready(views[pages])
            if turn:  # the first round compiles
                times[pages].append((time.perf_counter() - begin) / STEPS * 1e6)
    small = statistics.median(times[SIZES[0]])
    large = statistics.median(times[SIZES[1]])
    spread = {str(pages): [round(min(times[pages]), 1), round(max(times[pages]), 1)] for pages in SIZES}
    program = write.lower(views[SIZES[1]], steps[0], steps[0], metadata[SIZES[1]][0]).compile()
    return {
        "format": quantizer,
        "microseconds": {str(SIZES[0]): round(small, 1), str(SIZES[1]): round(large, 1)},
        "spread": spread,
        "ratio": round(large / small, 3),
        "temp_size_in_bytes": program.memory_analysis().temp_size_in_bytes,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="write the results here as JSON")
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    runs = []
    for quantizer in qpaged.available_formats():
        runs.append(measure(quantizer, arguments.rounds))
        print(json.dumps(runs[-1]), flush=True)
    results = {
        **circumstances(),
        "shape": {"kv_heads": HEADS, "page_size": PAGE_SIZE, "head_dim": HEAD_DIM, "rows": BATCH},
        "rounds": arguments.rounds,
        "runs": runs,
    }
    save(arguments.out, results)


if __name__ == "__main__":
    main()
