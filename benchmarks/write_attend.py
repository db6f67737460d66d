"""Times writes and attention in each format, beside plain bfloat16 pages.

    python benchmarks/write_attend.py --out benchmarks/results/write_attend.json

One layer has 8 sequences of 1024 tokens, 32 query heads over 8 KV heads, head_dim 128, and pages of 16 slots.
Timed are a donated decode write of 8 rows, a donated prefill write of 512 tokens, and the decode attention of
8 queries by the default backend. Formats take turns round by round in one process; times are medians.

Plain bfloat16 pools are slow on CPU, where XLA copies them; ``raw`` holds the same bits as integers.
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

    quantizer: str
    view: View
    times: dict[str, list[float]]


def rows(count: int, heads: int, seed: int) -> jax.Array:
    """Return Gaussian bfloat16 values [count, heads, head_dim]."""
    return jnp.asarray(np.random.default_rng(seed).normal(size=(count, heads, HEAD_DIM)), jnp.bfloat16)


def filled_subject(quantizer: str) -> Subject:
    """Return a format with a view that holds all sequences."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", qpaged.NarrowFloatPoolWarning)
        view = View.init(None, jnp.bfloat16, CONFIG, 0, None, quantizer)
    for sequence in range(BATCH):
        for start in range(0, LENGTH, PROMPT):
            metadata = qpaged.PagedAttentionMetadata.prefill(
                position=start + np.arange(PROMPT), page_table=TABLE[sequence]
            )
            key = rows(PROMPT, HEADS, sequence)
            view = prefill_write(view, key, key, metadata)
    return Subject(quantizer, view, {"decode write": [], "prefill write": [], "attention": []})


def time_step(times: list[float], repeats: int, step: Callable[[], object]) -> None:
    """Append the seconds of one of ``repeats`` steps."""
    begin = time.perf_counter()
    for _ in range(repeats):
        out = step()
    jax.block_until_ready(out)
    times.append((time.perf_counter() - begin) / repeats)


def time_round(subject: Subject) -> None:
    """Time all three operations once."""
    new = rows(BATCH, HEADS, 1)
    prompt = rows(PROMPT, HEADS, 2)
    query = rows(BATCH, Q_HEADS, 3)

    def write_decode() -> View:
        subject.view = decode_write(subject.view, new, new, DECODE)
        return subject.view

    def write_prompt() -> View:
        subject.view = prefill_write(subject.view, prompt, prompt, PREFILL)
        return subject.view

    time_step(subject.times["decode write"], 20, write_decode)
    time_step(subject.times["prefill write"], 2, write_prompt)
    time_step(subject.times["attention"], 2, lambda: attend(query, subject.view, DECODE))


def result(subject: Subject) -> dict[str, object]:
    """Return what was measured of a format; its first round compiles and does not count."""
    milliseconds = {name: [1e3 * seconds for seconds in times[1:]] for name, times in subject.times.items()}
    return {
        "format": subject.quantizer,
        "bits": 8 * subject.view.key_pages.nbytes / subject.view.key_pages.size,
        "milliseconds": {name: round(statistics.median(times), 4) for name, times in milliseconds.items()},
        "spread": {
            name: [round(min(times), 4), round(max(times), 4)] for name, times in milliseconds.items()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="write the results here as JSON")
    parser.add_argument("--formats", help="spellings, separated by commas; plain is always first")
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    formats = qpaged.available_formats(wrapped=True)
    if arguments.formats:
        formats = arguments.formats.split(",")
    subjects = [filled_subject(quantizer) for quantizer in dict.fromkeys(["plain", *formats])]
    for turn in range(arguments.rounds + 1):
        for number, subject in enumerate(subjects):
            print(f"\rround {turn}: {number + 1} of {len(subjects)} ", end="", file=sys.stderr, flush=True)
            time_round(subject)
    print(file=sys.stderr)
    runs = [result(subject) for subject in subjects]
    for run in runs:
        print(f"{run['format']:34s}", *(f"{time:9.3f}" for time in run["milliseconds"].values()))
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
