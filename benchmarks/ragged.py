"""Times attention of ragged batches beside that of the same sequences in calls of their own.

    python benchmarks/ragged.py --out benchmarks/results/ragged.json

A layer has 32 query heads over 8 KV heads, head_dim 128, and pages of 16 slots; contexts have up to 4,096
tokens. A batch is attended to in one call, and in one call for each sequence with several tokens and one for
all others, which are a decode. Both forms take turns; times are medians.
"""

import argparse
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from record import circumstances, save

import qpaged

HEADS, Q_HEADS, HEAD_DIM, PAGE_SIZE, LONGEST = 8, 32, 128, 16, 4096
FORMATS = "raw", "int8", "int8:token", "int4+rotate"
# The new tokens of each sequence, and its tokens with them.
BATCHES = {
    "four prompts of 512": ([512] * 4, [512] * 4),
    "chunks of 250 of eight": ([250] * 8, [750] * 8),
    "one prompt of 1,024 and 16 decodes": ([1024, *[1] * 16], [1024, *[2048] * 16]),
    "prompts of 1 to 700, 8 decodes": ([700, 300, 90, 33, 1, *[1] * 8], [700, 900, 90, 1000, 1, *[4096] * 8]),
    "drafts of 5 of sixteen": ([5] * 16, [2048] * 16),
}


@dataclass
class Case:
    """A batch, in both forms.

    Attributes:
        name: in :data:`BATCHES`.
        ragged: the batch as one step.
        apart: the same as prefills and one decode, each with its tokens of the batch.
    """

    name: str
    ragged: qpaged.PagedAttentionMetadata
    apart: list[tuple[slice, qpaged.PagedAttentionMetadata]]


attend = jax.jit(qpaged.paged_attention)


def case_of(name: str) -> Case:
    """Return a batch; its sequences with several tokens come first."""
    new, lengths = (np.asarray(counts) for counts in BATCHES[name])
    table = page_table(len(new))
    starts = np.concatenate([[0], np.cumsum(new)])
    position = np.concatenate([np.arange(end - count, end) for count, end in zip(new, lengths, strict=True)])
    ragged = qpaged.PagedAttentionMetadata.ragged(position=position, page_tables=table, starts=starts)
    apart = []
    for sequence in np.flatnonzero(new > 1):
        here = slice(int(starts[sequence]), int(starts[sequence + 1]))
        apart.append(
            (here, qpaged.PagedAttentionMetadata.prefill(position=position[here], page_table=table[sequence]))
        )
    rows = np.flatnonzero(new == 1)
    if len(rows):
        here = slice(int(starts[rows[0]]), int(starts[-1]))
        apart.append(
            (here, qpaged.PagedAttentionMetadata.decode(position=position[here], page_table=table[rows]))
        )
    return Case(name, ragged, apart)


def page_table(sequences: int) -> np.ndarray:
    """Return the shuffled pages of sequences of the longest length, [sequences, pages]."""
    pages = LONGEST // PAGE_SIZE
    return np.random.default_rng(0).permutation(sequences * pages).reshape(sequences, pages).astype(np.int32)


def view_of(quantizer: str, sequences: int) -> qpaged.PagedAttentionCacheView:
    """Return a view whose pages all hold normal numbers."""
    pages = sequences * LONGEST // PAGE_SIZE
    config = qpaged.PagedAttentionCacheMetaData(
        sequences, 1, pages, LONGEST // PAGE_SIZE, LONGEST, PAGE_SIZE, HEADS, HEAD_DIM, 0.5
    )
    view = qpaged.PagedAttentionCacheView.init(None, jnp.bfloat16, config, 0, None, quantizer)
    write = jax.jit(qpaged.PagedAttentionCacheView.write_prefill_to_cache, donate_argnums=0)
    for sequence, table in enumerate(page_table(sequences)):
        rows = normal(LONGEST, HEADS, sequence)
        metadata = qpaged.PagedAttentionMetadata.prefill(position=np.arange(LONGEST), page_table=table)
        view = write(view, rows, rows, metadata)
    return view


def normal(tokens: int, heads: int, seed: int) -> jax.Array:
    """Return Gaussian bfloat16 values [tokens, heads, head_dim]."""
    return jnp.asarray(np.random.default_rng(seed).normal(size=(tokens, heads, HEAD_DIM)), jnp.bfloat16)


def measure(case: Case, quantizer: str, rounds: int) -> dict[str, object]:
    """Return the milliseconds of both forms; the first round compiles and does not count."""
    view = view_of(quantizer, len(case.ragged.ragged_page_tables))
    tokens = len(case.ragged.ragged_position)
    query = normal(tokens, Q_HEADS, 1)
    times: dict[str, list[float]] = {"ragged": [], "apart": []}
    for _ in range(rounds + 1):
        begin = time.perf_counter()
        jax.block_until_ready(attend(query, view, case.ragged))
        middle = time.perf_counter()
        for here, metadata in case.apart:
            jax.block_until_ready(attend(query[here], view, metadata))
        times["ragged"].append(1e3 * (middle - begin))
        times["apart"].append(1e3 * (time.perf_counter() - middle))
    medians = {name: statistics.median(of_form[1:]) for name, of_form in times.items()}
    return {
        "batch": case.name,
        "format": quantizer,
        "tokens": tokens,
        "milliseconds": {name: round(median, 2) for name, median in medians.items()},
        "ratio": round(medians["ragged"] / medians["apart"], 3),
        "spread": {
            name: [round(min(of_form[1:]), 2), round(max(of_form[1:]), 2)] for name, of_form in times.items()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="write the results here as JSON")
    parser.add_argument("--formats", default=",".join(FORMATS), help="spellings, separated by commas")
    parser.add_argument("--rounds", type=int, default=11)
    arguments = parser.parse_args()
    runs = []
    for name in BATCHES:
        case = case_of(name)
        for quantizer in arguments.formats.split(","):
            runs.append(measure(case, quantizer, arguments.rounds))
            print(
                "{batch:36s} {format:14s} {milliseconds} {ratio}".format(**runs[-1]),
                flush=True,
                file=sys.stderr,
            )
    shape = {
        "kv_heads": HEADS,
        "q_heads": Q_HEADS,
        "head_dim": HEAD_DIM,
        "page_size": PAGE_SIZE,
        "longest": LONGEST,
    }
    save(arguments.out, {**circumstances(), "shape": shape, "rounds": arguments.rounds, "runs": runs})


if __name__ == "__main__":
    main()
