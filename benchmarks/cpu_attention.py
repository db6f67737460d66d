"""Attention on CPU, beside other implementations.

    pip install torch "transformers<5" optimum-quanto hqq llama-cpp-python
    python benchmarks/cpu_attention.py --out benchmarks/results/cpu_attention.json

One decode step of one layer, or one chunk of a prompt, is timed at the shapes of ``shapes.py``. All
implementations take turns round by round in one process, in changing order, and everything is built anew for
each of a few sittings; times are medians over all rounds. A row has the milliseconds; the bytes of the live
tokens' keys and values as they are stored; those bytes over the time, as a share of the memory bandwidth of
the same run; and the largest error against float64 on the same inputs, over the largest output. Peers that
are not installed are left out, by name. ``plain`` is bfloat16 pages as JAX holds them, and ``raw`` holds the
same bits as integers.

For each format it also counts what a generation compiles: see ``compile_counts.py``.
"""

import argparse
import functools
import random
import statistics
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from compile_counts import count_compilations
from cpu_peers import PEERS
from cpu_subjects import THREADS, Inputs, Subject, print_missing
from layer_cache import decode_metadata, filled_view, stored_bytes_per_element
from record import circumstances, save
from shapes import SHAPES, Shape

import qpaged

FORMATS = (
    "plain",
    "raw",
    "int8",
    "int8:token",
    "int8:channel",
    "fp8_e4m3",
    "int6:token",
    "int4:token",
    "int4",
    "int4+rotate",
    "nvfp4",
)
BY_XLA = (
    "plain",
    "int8",
    "int8:token",
    "int4",
)  # formats that plain JAX attends to, too, beside the kernel in C
SITTINGS = 3  # with memory of their own: where it lies makes a difference of a fifth and more
# by the module that is imported
DISTRIBUTIONS = {
    "torch": "torch",
    "transformers": "transformers",
    "optimum": "optimum-quanto",
    "hqq": "hqq",
    "llama_cpp": "llama-cpp-python",
}
NARROW_INSTRUCTIONS = ("avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16")

Row = dict[str, Any]
"""One implementation's results at a shape, as JSON."""


def our_subjects(inputs: Inputs) -> Iterator[Subject]:
    """Yield qpaged's attention over pages of each format."""
    shape = inputs.shape
    attend = jax.jit(qpaged.paged_attention)
    attend_by_xla = jax.jit(functools.partial(qpaged.paged_attention, backend="xla"))
    metadata = step_metadata(shape)
    query = jnp.asarray(inputs.query, jnp.bfloat16)
    for quantizer in FORMATS:
        view = filled_view(quantizer, shape, inputs.keys, inputs.values)
        bytes_read = stored_bytes_per_element(view) * shape.elements
        yield Subject(
            f"qpaged {quantizer}",
            lambda view=view: attend(query, view, metadata).block_until_ready(),
            bytes_read,
        )
        if shape.chunk == 1 and quantizer in BY_XLA:
            yield Subject(
                f"qpaged {quantizer} by xla",
                lambda view=view: attend_by_xla(query, view, metadata).block_until_ready(),
                bytes_read,
            )


def step_metadata(shape: Shape) -> qpaged.PagedAttentionMetadata:
    """Return the metadata of a decode step, or of a prefill of one sequence's last chunk."""
    if shape.chunk == 1:
        return decode_metadata(shape)
    table, _ = shape.tables()
    position = shape.lengths[0] - shape.chunk + np.arange(shape.chunk)
    return qpaged.PagedAttentionMetadata.prefill(position=position, page_table=table[0])


def measure(shape: Shape, rounds: int, bandwidth: float) -> list[Row]:
    """Time everything at a shape and return a row for each implementation."""
    inputs = Inputs.random(shape)
    exact = inputs.exact_attention()
    times: dict[str, list[float]] = {}
    for sitting in range(SITTINGS):
        subjects = list(all_subjects(inputs))
        outs = [np.asarray(subject.step(), np.float64) for subject in subjects]  # this also compiles
        order = list(subjects)
        for turn in range(rounds):
            random.Random(turn).shuffle(order)  # so that none has always the same one before it
            show_progress(f"{shape.name}: sitting {sitting + 1} of {SITTINGS}, round {turn + 1} of {rounds}")
            for subject in order:
                begin = time.perf_counter()
                subject.step()
                times.setdefault(subject.name, []).append(1e3 * (time.perf_counter() - begin))
    print(file=sys.stderr)
    rows = []
    for subject, out in zip(subjects, outs, strict=True):
        subject.times = times[subject.name]
        rows.append(result_row(subject, np.abs(out - exact).max() / np.abs(exact).max(), bandwidth))
    return rows


def all_subjects(inputs: Inputs) -> Iterator[Subject]:
    """Yield ours and those of the peers that are installed."""
    yield from our_subjects(inputs)
    for module, peer in PEERS.items():
        if find_spec(module) is None:
            print_missing(module)
        else:
            yield from peer(inputs)


def show_progress(line: str) -> None:
    print(f"\r{line} ", end="", file=sys.stderr, flush=True)


def result_row(subject: Subject, error: float, bandwidth: float) -> Row:
    """Return what was measured of a subject."""
    median = statistics.median(subject.times)
    return {
        "name": subject.name,
        "milliseconds": round(median, 3),
        "spread": [round(min(subject.times), 3), round(max(subject.times), 3)],
        "bytes": round(subject.bytes_read),
        "of_bandwidth": round(subject.bytes_read / median * 1e3 / bandwidth, 3),
        "error": float(f"{error:.2g}"),
    }


def processor() -> Row:
    """Return the processor's name and its instructions for narrow numbers, as Linux reports them."""
    path = Path("/proc/cpuinfo")
    entries = {}
    if path.exists():
        for line in path.read_text().splitlines():
            key, _, value = line.partition(":")
            entries[key.strip()] = value.strip()
    flags = entries.get("flags", "").split()
    return {
        "name": entries.get("model name"),
        "has": [name for name in NARROW_INSTRUCTIONS if name in flags],
    }


def memory_bandwidth(rounds: int = 5) -> float:
    """Return the bytes per second that all threads together read from memory.

    It is the sum of 512 MB, in the best of the rounds.
    """
    numbers = jnp.ones(2**27, jnp.float32)
    total = jax.jit(lambda x: x.reshape(64, -1).sum(axis=1))
    total(numbers).block_until_ready()
    times = []
    for _ in range(rounds):
        begin = time.perf_counter()
        total(numbers).block_until_ready()
        times.append(time.perf_counter() - begin)
    return numbers.nbytes / min(times)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="write the results here as JSON")
    parser.add_argument("--shapes", default=",".join(list(SHAPES)[:9]), help="names, separated by commas")
    parser.add_argument("--rounds", type=int, default=7, help="of each sitting")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    bandwidth = memory_bandwidth()
    print(f"memory is read at {bandwidth / 1e9:.1f} GB/s by {THREADS} threads")
    runs = {}
    for name in arguments.shapes.split(","):
        runs[name] = measure(SHAPES[name], arguments.rounds, bandwidth)
        print(name)
        for run in runs[name]:
            print(
                f"  {run['name']:45s}{run['milliseconds']:10.2f} ms"
                f"{run['of_bandwidth']:8.0%}{run['error']:10.1e}"
            )
    compilations = [count_compilations(quantizer, SHAPES["8x1k"]) for quantizer in FORMATS]
    for counts in compilations:
        print(f"  {counts['name']:45s}{counts['step_compile_seconds']:10.2f} s  {counts['programs']}")
    packages = [package for module, package in DISTRIBUTIONS.items() if find_spec(module)]
    results = {
        **circumstances(packages),
        "processor": processor(),
        "threads": THREADS,
        "sittings": SITTINGS,
        "rounds": arguments.rounds,
        "bytes_per_second": round(bandwidth),
        "shapes": runs,
        "generation": compilations,
    }
    save(arguments.out, results)


if __name__ == "__main__":
    main()
