"""Times a decode step with exact pages beside the same format without: its write, its attention, and both.

    python benchmarks/exact_pages.py --out benchmarks/results/exact_pages.json

One layer has 8 sequences of 4,096 tokens on pages of 16 slots, 32 query heads over 8 KV heads, head_dim 128.
Each round goes on by two pages of every sequence: one is written, and attended to, and the other is written
and attended to step by step. So one write in 16 opens a page, and packs another. Formats take turns round by
round in one process; times are medians over rounds. Temporaries are those of a donated step that writes and
attends, at 512 and at 32,768 pages.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from record import circumstances, save

import qpaged

BATCH, LENGTH, HEADS, Q_HEADS, HEAD_DIM, PAGE_SIZE, CHUNK = 8, 4096, 8, 32, 128, 16, 512
PAGES_PER_SEQUENCE = LENGTH // PAGE_SIZE
FORMATS = "int8", "int8:token+rotate", "int4+rotate", "int4:token+rotate"
SUFFIX = "+exact128"
POOLS = 512, 32_768
KINDS = "write", "attention", "step"

View = qpaged.PagedAttentionCacheView


def step(
    view: View, key: jax.Array, value: jax.Array, query: jax.Array, metadata: qpaged.PagedAttentionMetadata
) -> tuple[jax.Array, View]:
    """Write the newest tokens, and attend."""
    view = view.write_decodes_to_cache(key, value, metadata)
    return qpaged.paged_attention(query, view, metadata), view


PROGRAMS: dict[str, Callable[..., Any]] = {
    "write": jax.jit(View.write_decodes_to_cache, donate_argnums=0),
    "attention": jax.jit(qpaged.paged_attention),
    "step": jax.jit(step, donate_argnums=0),
}


@dataclass
class Subject:
    """A format, its view, and the seconds that a write, attention and both took in each round."""

    quantizer: str
    view: View
    times: dict[str, list[float]] = field(default_factory=lambda: {kind: [] for kind in KINDS})


def empty_view(quantizer: str, pages: int) -> View:
    """Return an empty view of ``pages`` pages."""
    config = qpaged.PagedAttentionCacheMetaData(
        BATCH, 1, pages, PAGES_PER_SEQUENCE, LENGTH, PAGE_SIZE, HEADS, HEAD_DIM, 0.5
    )
    return View.init(None, jnp.bfloat16, config, 0, None, quantizer)


def table(pages: int) -> np.ndarray:
    """Return page tables [sequences, pages] of sequences whose pages are scattered."""
    order = np.random.default_rng(0).permutation(pages)
    return np.resize(order, (BATCH, PAGES_PER_SEQUENCE))


def filled(quantizer: str, length: int) -> Subject:
    """Return a format with a view that holds the first ``length`` tokens of all sequences."""
    write = jax.jit(View.write_prefill_to_cache, donate_argnums=0)
    view, tables = empty_view(quantizer, BATCH * PAGES_PER_SEQUENCE), table(BATCH * PAGES_PER_SEQUENCE)
    for sequence in range(BATCH):
        for start in range(0, length, CHUNK):
            position = start + np.arange(min(CHUNK, length - start))
            metadata = qpaged.PagedAttentionMetadata.prefill(position=position, page_table=tables[sequence])
            rows = normal(len(position), HEADS, seed=sequence)
            view = write(view, rows, rows, metadata)
    return Subject(quantizer, view)


def normal(count: int, heads: int, seed: int) -> jax.Array:
    """Return Gaussian bfloat16 values [count, heads, head_dim]."""
    return jnp.asarray(np.random.default_rng(seed).normal(size=(count, heads, HEAD_DIM)), jnp.bfloat16)


def decode(position: int, tables: np.ndarray) -> qpaged.PagedAttentionMetadata:
    return qpaged.PagedAttentionMetadata.decode(position=np.full(BATCH, position), page_table=tables)


def time_round(subject: Subject, start: int, tables: np.ndarray) -> None:
    """Time all kinds of step once, over the slots of the two pages from ``start`` on."""
    rows, query = normal(BATCH, HEADS, seed=1), normal(BATCH, Q_HEADS, seed=2)
    steps = [decode(start + index, tables) for index in range(2 * PAGE_SIZE)]

    def timed(
        kind: str,
        run: Callable[[qpaged.PagedAttentionMetadata], Any],
        of_page: Sequence[qpaged.PagedAttentionMetadata],
    ) -> None:
        begin = time.perf_counter()
        for metadata in of_page:
            out = run(metadata)
        jax.block_until_ready(out)
        subject.times[kind].append((time.perf_counter() - begin) / PAGE_SIZE)

    def write(metadata: qpaged.PagedAttentionMetadata) -> View:
        subject.view = PROGRAMS["write"](subject.view, rows, rows, metadata)
        return subject.view

    def write_and_attend(metadata: qpaged.PagedAttentionMetadata) -> jax.Array:
        out, subject.view = PROGRAMS["step"](subject.view, rows, rows, query, metadata)
        return out

    timed("write", write, steps[:PAGE_SIZE])
    # The newest token alone, since the older ones would see more exact pages than they have left.
    last = [steps[PAGE_SIZE - 1]] * PAGE_SIZE
    timed("attention", lambda metadata: PROGRAMS["attention"](query, subject.view, metadata), last)
    timed("step", write_and_attend, steps[PAGE_SIZE:])


def temporaries(quantizer: str, pages: int) -> int:
    """Return the bytes of a step's temporaries in pools of ``pages`` pages."""
    rows, query = normal(BATCH, HEADS, seed=1), normal(BATCH, Q_HEADS, seed=2)
    arguments = empty_view(quantizer, pages), rows, rows, query, decode(LENGTH - 1, table(pages))
    compiled = PROGRAMS["step"].lower(*arguments).compile()
    size: int = compiled.memory_analysis().temp_size_in_bytes
    return size


def result(subject: Subject) -> dict[str, Any]:
    """Return what was measured of a format; its first round compiles and does not count."""
    milliseconds = {kind: [1e3 * seconds for seconds in times[1:]] for kind, times in subject.times.items()}
    return {
        "format": subject.quantizer,
        "milliseconds": {kind: round(statistics.median(times), 4) for kind, times in milliseconds.items()},
        "spread": {
            kind: [round(min(times), 4), round(max(times), 4)] for kind, times in milliseconds.items()
        },
        "temp_size_in_bytes": {str(pages): temporaries(subject.quantizer, pages) for pages in POOLS},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="write the results here as JSON")
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    tables = table(BATCH * PAGES_PER_SEQUENCE)
    first = LENGTH - 2 * PAGE_SIZE * (arguments.rounds + 1)
    subjects = [filled(name + suffix, first) for name in FORMATS for suffix in ("", SUFFIX)]
    for turn in range(arguments.rounds + 1):
        for number, subject in enumerate(subjects):
            print(f"\rround {turn}: {number + 1} of {len(subjects)} ", end="", file=sys.stderr, flush=True)
            time_round(subject, first + 2 * PAGE_SIZE * turn, tables)
    print(file=sys.stderr)
    runs = [result(subject) for subject in subjects]
    for run in runs:
        print(run["format"], run["milliseconds"], run["temp_size_in_bytes"])
    shape = {"batch": BATCH, "length": LENGTH, "kv_heads": HEADS, "q_heads": Q_HEADS, "head_dim": HEAD_DIM}
    results = {
        **circumstances(),
        "shape": shape | {"page_size": PAGE_SIZE},
        "rounds": arguments.rounds,
        "runs": runs,
    }
    save(arguments.out, results)


if __name__ == "__main__":
    main()
