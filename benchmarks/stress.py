"""What formats lose on keys and values that are hard to quantize, and whether they keep to their targets.

    python benchmarks/stress.py --out benchmarks/results/stress.json
    python benchmarks/stress.py --formats int8,int8:channel/int8:token --page-size 16

Each case of ``stress_cases.py`` is written to the cache as serving does it: a prompt in two chunks, then one
token at a time, on pages that lie spread over the pool. The losses of ``stress_metrics.py`` are of what reads
back, means over eight amplitudes of one octave: scales that are powers of two fit some better than others.
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
DECODED = 16  # tokens written one by one; the chunks before them end inside a page
OCTAVE = [2 ** (i / 8) for i in range(8)]


@dataclass(frozen=True)
class Measurement:
    """A format's bits and losses at one page size.

    Attributes:
        key_bits: bits of the pool of keys, scales included, for each element.
        value_bits: likewise.
        losses: for each case the means of each of :class:`stress_metrics.Losses`.
    """

    format: str
    page_size: int
    key_bits: float
    value_bits: float
    losses: dict[str, dict[str, float | None]]


def empty_view(format: str, page_size: int, sizes: Sizes) -> qpaged.PagedAttentionCacheView:
    pages = -(-sizes.tokens // page_size)
    config = qpaged.PagedAttentionCacheMetaData(
        1, 1, pages, pages, sizes.tokens, page_size, sizes.kv_heads, sizes.head_dim, 0.9
    )
    return qpaged.PagedAttentionCacheView.init(None, jnp.float32, config, 0, None, format)


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
    """Keys and values in the order of their tokens, (kv_heads, pages * page_size, head_dim)."""
    pools = (view.key_pages, view.value_pages)
    arrays = (pool.materialize() if isinstance(pool, ImplicitArray) else pool for pool in pools)
    return [pool[:, table].reshape(pool.shape[0], -1, pool.shape[-1]) for pool in arrays]


def round_trip(view: qpaged.PagedAttentionCacheView, case: Case) -> list[np.ndarray]:
    """The keys and values of ``case`` as they read back from ``view``, which must be empty."""
    key, value = (np.float32(x).swapaxes(0, 1) for x in (case.key, case.value))
    table = np.random.default_rng(0).permutation(view.metadata.num_pages_per_layer).astype(np.int32)
    chunk = (len(key) - DECODED) // 2
    for start in (0, chunk):
        rows = slice(start, start + chunk)
        view = write_chunk(view, key[rows], value[rows], np.int32(start), table)
    for token in range(2 * chunk, len(key)):
        rows = slice(token, token + 1)
        view = write_token(view, key[rows], value[rows], np.int32(token), table)
    return [np.asarray(array)[:, : len(key)] for array in read(view, table)]


def measure(format: str, page_size: int, cases: dict[str, Case], sizes: Sizes) -> Measurement:
    view = empty_view(format, page_size, sizes)
    losses = {}
    for name, case in cases.items():
        octave = [case.scaled(amplitude) for amplitude in OCTAVE]
        losses[name] = mean_losses([measure_losses(one, *round_trip(view, one)) for one in octave])
    bits = [8 * pool.nbytes / pool.size for pool in (view.key_pages, view.value_pages)]
    return Measurement(format, page_size, *bits, losses)


def run(formats: Sequence[str], page_sizes: Sequence[int], sizes: Sizes = SIZES) -> dict[str, Any]:
    """Everything measured, as JSON; progress on stderr."""
    for format in formats:
        qpaged.CacheFormat.of(format)  # what is misspelled is told before an hour's work
    cases = {name: make_case(name, sizes) for name in CASES}
    runs = []
    for number, format in enumerate(formats, 1):
        begin = time.perf_counter()
        runs += [asdict(measure(format, page_size, cases, sizes)) for page_size in page_sizes]
        seconds = time.perf_counter() - begin
        print(f"{number}/{len(formats)}  {format}  {seconds:.1f} s", file=sys.stderr, flush=True)
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
    parser.add_argument(
        "--formats", help="spellings with commas between them; every installed one if left out"
    )
    parser.add_argument(
        "--page-size", type=int, action="append", help="may be given several times; 16 and 64"
    )
    arguments = parser.parse_args()
    formats = arguments.formats.split(",") if arguments.formats else qpaged.available_formats()
    results = run(formats, arguments.page_size or PAGE_SIZES)
    for verdict in results["targets"]:
        print(describe(verdict))
    save(arguments.out, results)


if __name__ == "__main__":
    main()
