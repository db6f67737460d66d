"""What writing and attending cost in each format, beside plain bfloat16 pages.

    python benchmarks/write_attend.py --out benchmarks/results/write_attend.json

One layer, 8 sequences of 1024 tokens, 32 query heads over 8 KV heads, head_dim 128, pages of 16 slots. Timed
are a donated decode write of 8 rows, a donated prefill write of 512 tokens, and the decode attention of 8
queries by the default backend. Formats take turns round by round in one process; medians over rounds.

Plain bfloat16 pools are slow on CPU, where XLA copies them whole; ``raw`` holds the same bits as integers.
"""

import argparse
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from record import circumstances, save

import qpaged

BATCH, LENGTH, HEADS, Q_HEADS, HEAD_DIM, PAGE_SIZE, PROMPT = 8, 1024, 8, 32, 128, 16, 512
PAGES = BATCH * LENGTH // PAGE_SIZE
TABLE = np.random.default_rng(0).permutation(PAGES).reshape(BATCH, -1)
CONFIG = qpaged.PagedAttentionCacheMetaData(
    BATCH, 1, PAGES, LENGTH // PAGE_SIZE, LENGTH, PAGE_SIZE, HEADS, HEAD_DIM, 0.5
)
DECODE = qpaged.PagedAttentionMetadata.decode(position=np.full(BATCH, LENGTH - 1), page_table=TABLE)
PREFILL = qpaged.PagedAttentionMetadata.prefill(position=np.arange(PROMPT), page_table=TABLE[0])

View = qpaged.PagedAttentionCacheView
decode_write = jax.jit(View.write_decodes_to_cache, donate_argnums=0)
prefill_write = jax.jit(View.write_prefill_to_cache, donate_argnums=0)
attend = jax.jit(qpaged.paged_attention)


@dataclass
class Subject:
    """A format, its filled view, and the seconds that its operations took."""

    format: str
    view: View
    times: dict[str, list[float]]


def rows(count: int, heads: int, seed: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=(count, heads, HEAD_DIM)), jnp.bfloat16)


def subject(format: str) -> Subject:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", qpaged.NarrowFloatPoolWarning)
        view = View.init(None, jnp.bfloat16, CONFIG, 0, None, format)
    for sequence in range(BATCH):
        for start in range(0, LENGTH, PROMPT):
            metadata = qpaged.PagedAttentionMetadata.prefill(
                position=start + np.arange(PROMPT), page_table=TABLE[sequence]
            )
            key = rows(PROMPT, HEADS, sequence)
            view = prefill_write(view, key, key, metadata)
    return Subject(format, view, {"decode write": [], "prefill write": [], "attention": []})


def timed(times: list[float], repeats: int, step: Callable[[], object]) -> None:
    begin = time.perf_counter()
    for _ in range(repeats):
        out = step()
    jax.block_until_ready(out)
    times.append((time.perf_counter() - begin) / repeats)


def round_of(subject: Subject) -> None:
    """One round of all three operations."""
    new, prompt, query = rows(BATCH, HEADS, 1), rows(PROMPT, HEADS, 2), rows(BATCH, Q_HEADS, 3)

    def write(operation: Callable, rows: jax.Array, metadata: qpaged.PagedAttentionMetadata) -> View:
        subject.view = operation(subject.view, rows, rows, metadata)
        return subject.view

    timed(subject.times["decode write"], 20, lambda: write(decode_write, new, DECODE))
    timed(subject.times["prefill write"], 2, lambda: write(prefill_write, prompt, PREFILL))
    timed(subject.times["attention"], 2, lambda: attend(query, subject.view, DECODE))


def result(subject: Subject) -> dict[str, object]:
    milliseconds = {name: [1e3 * t for t in times[1:]] for name, times in subject.times.items()}
    return {
        "format": subject.format,
        "bits": 8 * subject.view.key_pages.nbytes / subject.view.key_pages.size,
        "milliseconds": {name: round(statistics.median(t), 4) for name, t in milliseconds.items()},
        "spread": {name: [round(min(t), 4), round(max(t), 4)] for name, t in milliseconds.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="write the results here as JSON")
    parser.add_argument("--formats", help="spellings, separated by commas; plain is always first")
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    asked = arguments.formats.split(",") if arguments.formats else qpaged.available_formats(wrapped=True)
    subjects = [subject(format) for format in dict.fromkeys(["plain", *asked])]
    for turn in range(arguments.rounds + 1):  # the first compiles
        for number, each in enumerate(subjects):
            print(f"\rround {turn}: {number + 1} of {len(subjects)} ", end="", file=sys.stderr, flush=True)
            round_of(each)
    print(file=sys.stderr)
    runs = [result(each) for each in subjects]
    for run in runs:
        print(f"{run['format']:34s}", *(f"{t:9.3f}" for t in run["milliseconds"].values()))
    shape = {"batch": BATCH, "length": LENGTH, "kv_heads": HEADS, "q_heads": Q_HEADS, "head_dim": HEAD_DIM}
    results = {
        **circumstances(),
        "shape": shape | {"page_size": PAGE_SIZE, "prompt": PROMPT},
        "rounds": arguments.rounds,
        "runs": runs,
    }
    save(arguments.out, results)


if __name__ == "__main__":
    main()
