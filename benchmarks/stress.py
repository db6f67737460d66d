"""Measures what formats lose on keys and values that are hard to quantize, and judges their targets.

    python benchmarks/stress.py --out benchmarks/results/stress.json
    python benchmarks/stress.py --formats int8,int8:channel/int8:token --page-size 16

Each case of ``stress_cases.py`` is written to the cache as a server writes it: a prompt in two chunks, then
one token at a time, on pages scattered over the pool. The losses of ``stress_metrics.py`` compare what reads
back. They are means over eight amplitudes of one octave, since scales that are powers of two fit some
amplitudes better than others.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from record import circumstances, save
from stress_cases import CASES, Case, Sizes, make_case
from stress_metrics import mean_entropy, mean_losses, measure_losses
from stress_targets import TARGETS, describe, judge

import qpaged
from qpaged.implicit import ImplicitArray

SIZES = Sizes()
PAGE_SIZES = (16, 64)
DECODED = 16  # tokens written one by one; with 512 tokens, the chunks before them end inside a page
OCTAVE = [2 ** (i / 8) for i in range(8)]


@dataclass(frozen=True)
class Measurement:
    """A format's bits and losses at one page size; the field names are those of the results file.

    Attributes:
        format: its spelling.
        page_size: slots of a page.
        key_bits: bits per element of the keys, scales included.
        value_bits: bits per element of the values.
        losses: for each case, the mean of each of :class:`stress_metrics.Losses`.
    """

    format: str
    page_size: int
    key_bits: float
    value_bits: float
    losses: dict[str, dict[str, float | None]]


def empty_view(quantizer: str, page_size: int, sizes: Sizes) -> qpaged.PagedAttentionCacheView:
    """Return an empty view that holds all tokens of a case."""
    pages = -(-sizes.tokens // page_size)
    config = qpaged.PagedAttentionCacheMetaData(
        1, 1, pages, pages, sizes.tokens, page_size, sizes.kv_heads, sizes.head_dim, 0.9
    )
    return qpaged.PagedAttentionCacheView.init(None, jnp.float32, config, 0, None, quantizer)


@jax.jit
def write_chunk(view, key, value, start, table):
    position = start + jnp.arange(len(key))
    metadata = qpaged.PagedAttentionMetadata.prefill(position=position, page_table=table)
    return view.write_prefill_to_cache(key, value, metadata)


@jax.jit
def write_token(view, key, value, position, table):
    metadata = qpaged.PagedAttentionMetadata.decode(position=position[None], page_table=table[None])
    return view.write_decodes_to_cache(key, value, metadata)


@jax.jit
def read(view, table):
    """Return keys and values in the order of their tokens, [kv_heads, pages * page_size, head_dim]."""
    return read_pool(view.key_pages, table), read_pool(view.value_pages, table)


def read_pool(pool, table):
    """Return the slots of a sequence, [kv_heads, pages * page_size, head_dim]."""
    if isinstance(pool, ImplicitArray):
        pool = pool.materialize()
    return pool[:, table].reshape(pool.shape[0], -1, pool.shape[-1])


def round_trip(view: qpaged.PagedAttentionCacheView, case: Case) -> list[np.ndarray]:
    """Write a case to an empty view and return its keys and values as they read back."""
    key = np.float32(case.key).swapaxes(0, 1)  # [tokens, kv_heads, head_dim]
    value = np.float32(case.value).swapaxes(0, 1)
    table = np.random.default_rng(0).permutation(view.metadata.num_pages_per_layer).astype(np.int32)
    chunk = (len(key) - DECODED) // 2
    for start in (0, chunk):
        rows = slice(start, start + chunk)
        view = write_chunk(view, key[rows], value[rows], np.int32(start), table)
    for token in range(2 * chunk, len(key)):
        rows = slice(token, token + 1)
        view = write_token(view, key[rows], value[rows], np.int32(token), table)
    return [np.asarray(array)[:, : len(key)] for array in read(view, table)]


def measure(quantizer: str, page_size: int, cases: dict[str, Case], sizes: Sizes) -> Measurement:
    """Measure a format in every case, at one page size."""
    view = empty_view(quantizer, page_size, sizes)
    losses = {}
    for name, case in cases.items():
        case_losses = []
        for amplitude in OCTAVE:
            scaled = case.scaled(amplitude)
            key, value = round_trip(view, scaled)
            case_losses.append(measure_losses(scaled, key, value))
        losses[name] = mean_losses(case_losses)
    return Measurement(
        format=quantizer,
        page_size=page_size,
        key_bits=8 * view.key_pages.nbytes / view.key_pages.size,
        value_bits=8 * view.value_pages.nbytes / view.value_pages.size,
        losses=losses,
    )


def run(formats: Sequence[str], page_sizes: Sequence[int], sizes: Sizes = SIZES) -> dict[str, Any]:
    """Measure formats at page sizes and return the results as JSON; progress goes to stderr."""
    for quantizer in formats:
        qpaged.CacheFormat.of(quantizer)  # raises for a misspelled format before an hour's work
    cases = {name: make_case(name, sizes) for name in CASES}
    runs = []
    for number, quantizer in enumerate(formats, 1):
        begin = time.perf_counter()
        for page_size in page_sizes:
            runs.append(asdict(measure(quantizer, page_size, cases, sizes)))
        seconds = time.perf_counter() - begin
        print(f"{number}/{len(formats)}  {quantizer}  {seconds:.1f} s", file=sys.stderr, flush=True)
    return {
        **circumstances(),
        "sizes": asdict(sizes),
        "cases": {
            name: {"what": CASES[name].__doc__, "entropy": round(mean_entropy(case), 3)}
            for name, case in cases.items()
        },
        "targets": [judge(target, runs) for target in TARGETS],
        "runs": runs,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="write the results here as JSON")
    parser.add_argument("--formats", help="spellings, separated by commas; by default every installed one")
    parser.add_argument(
        "--page-size", type=int, action="append", help="may be given several times; by default 16 and 64"
    )
    arguments = parser.parse_args()
    formats = qpaged.available_formats()
    if arguments.formats:
        formats = arguments.formats.split(",")
    results = run(formats, arguments.page_size or PAGE_SIZES)
    for verdict in results["targets"]:
        print(describe(verdict))
    save(arguments.out, results)


if __name__ == "__main__":
    main()
