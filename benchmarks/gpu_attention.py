"""Decode attention on a GPU against the memory bandwidth of the same run, beside other implementations.

    python benchmarks/gpu_attention.py --out benchmarks/results/gpu_attention.json

Needs a Hopper GPU and absl-py; it has not run on one yet. It takes under ten minutes: no shape begins after
``--minutes``, and results are saved after each shape. Peers that are not installed, and whatever fails, have
a row that says why.

First each format's kernel is checked in a process of its own, which may crash or hang: its largest error
against the ``reference`` backend on the same pages, over the largest output. Formats that finish are timed.

Then one decode step of one layer is timed at the shapes of ``shapes.py``. All implementations take turns
round by round in one process; a round launches several steps one after another, and times are medians over
rounds. A row has the milliseconds of a step; the bytes of the live tokens' keys and values as they are
stored; those bytes over the time, as a share of what a copy of 1 GB reads and writes in the same run; and
the largest error against float32 on the same inputs, over the largest output. ``targets`` are the speeds
that the kernel aims at, and whether it reached them.
"""

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # leave memory for the peers

import gpu_peers
import jax
import jax.numpy as jnp
import numpy as np
from gpu_subjects import Candidates, Inputs, Subject
from layer_cache import decode_metadata, filled_view, stored_bytes_per_element
from record import circumstances, save
from shapes import SHAPES, Shape

import qpaged

FORMATS = "plain", "int8", "int8:token", "fp8_e4m3", "int4:token"
MEASURED = "64x8k", "1x128k", "256x1k", "8x4k 64 dims"
CHECK_SECONDS = 60
DISTRIBUTIONS = "torch", "triton", "flashinfer-python"
# head_dim, page_size, options of the attention
CHECKS: tuple[tuple[int, int, dict[str, Any]], ...] = (
    (128, 16, {}),
    (128, 64, {"sliding_window": 300, "logits_soft_cap": 3.0, "sinks": np.arange(8, dtype=np.float32) - 4}),
    (64, 64, {"sliding_window": 70}),
    (256, 32, {}),
)

Row = dict[str, Any]
"""One implementation's results at a shape, as JSON."""


def our_candidates(inputs: Inputs, formats: Sequence[str], backends: Sequence[str]) -> Candidates:
    """Yield qpaged's backends in each format."""
    for quantizer in formats:
        for backend in backends:
            yield f"qpaged {backend} {quantizer}", functools.partial(our_subject, inputs, quantizer, backend)


def our_subject(inputs: Inputs, quantizer: str, backend: str) -> Subject:
    """Build a backend of qpaged over pages of a format."""
    view = filled_view(quantizer, inputs.shape, inputs.keys, inputs.values)
    metadata = jax.device_put(decode_metadata(inputs.shape))
    attend = jax.jit(functools.partial(qpaged.paged_attention, backend=backend))
    bytes_per_element = stored_bytes_per_element(view)
    return Subject(
        f"qpaged {backend} {quantizer}",
        lambda: attend(inputs.query, view, metadata),
        jax.block_until_ready,
        bytes_per_element * inputs.shape.elements,
        int(8 * bytes_per_element),
    )


def measure(inputs: Inputs, candidates: Candidates, rounds: int, bandwidth: float) -> list[Row]:
    """Return a row for each candidate, those that fail included."""
    exact = inputs.exact_attention()
    rows: list[Row] = []
    subjects: list[tuple[Subject, Row]] = []
    for name, build in candidates:
        row: Row = {"name": name}
        rows.append(row)
        try:
            subject = build()
            out = to_numpy(subject.step()).reshape(exact.shape)
            row["error"] = relative_error(out, exact)
            subject.time_round()  # a round that does not count, since it may still compile
        except Exception as error:  # a peer's failure is a result, whatever it raises
            row["refused"] = reason(error)
            print(f"  {name}: {row['refused']}", file=sys.stderr, flush=True)
        else:
            subjects.append((subject, row))
    for _ in range(rounds):
        for subject, _ in subjects:
            subject.times.append(subject.time_round())
    for subject, row in subjects:
        row |= timing_row(subject, bandwidth)
    return rows


def timing_row(subject: Subject, bandwidth: float) -> Row:
    """Return what the rounds of a subject came to."""
    median = statistics.median(subject.times)
    return {
        "milliseconds": round(median, 4),
        "spread": [round(min(subject.times), 4), round(max(subject.times), 4)],
        "bytes": round(subject.bytes_read),
        "bits": subject.bits,
        "paged": subject.paged,
        "of_bandwidth": round(subject.bytes_read / median * 1e3 / bandwidth, 3),
    }


def to_numpy(out: Any) -> np.ndarray:
    """Return an output of JAX or of torch as NumPy float32."""
    if isinstance(out, jax.Array):
        return np.asarray(out, np.float32)
    return out.float().cpu().numpy()


def relative_error(out: np.ndarray, exact: np.ndarray) -> float:
    """Return the largest error over the largest exact output, to two digits."""
    return float(f"{np.abs(out - exact).max() / np.abs(exact).max():.2g}")


def reason(error: BaseException) -> str:
    """Return an exception as one short line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def copy_bandwidth(size: int = 2**30) -> float:
    """Return the bytes per second that a copy on the device reads and writes."""
    array = jnp.zeros(size, jnp.int8)
    copy = jax.jit(jnp.copy)
    subject = Subject("copy", lambda: copy(array), jax.block_until_ready, 2 * array.nbytes, 8)
    subject.time_round()
    milliseconds = statistics.median(subject.time_round() for _ in range(5))
    return 2 * array.nbytes / milliseconds * 1e3


def check(quantizer: str, backend: str = "gpu") -> list[Row]:
    """Return a kernel's errors against the reference on the same pages, for each of ``CHECKS``."""
    results = []
    for head_dim, page_size, options in CHECKS:
        shape = Shape("check", (1024, 64, 256), 8, 2, head_dim, page_size)
        inputs = Inputs.random(shape)
        view = filled_view(quantizer, shape, inputs.keys, inputs.values)
        metadata, rows = mixed_metadata(shape)
        query = jax.random.normal(jax.random.key(0), (rows, shape.q_heads, head_dim), jnp.bfloat16)

        @functools.partial(jax.jit, static_argnames=("backend", "sliding_window", "logits_soft_cap"))
        def attend(query, view, metadata, **options):
            return qpaged.paged_attention(query, view, metadata, **options).astype(jnp.float32)

        out = np.asarray(attend(query, view, metadata, backend=backend, **options))
        expected = np.asarray(attend(query, view, metadata, backend="reference", **options))
        case = {"head_dim": head_dim, "page_size": page_size, "options": sorted(options)}
        results.append(case | {"error": relative_error(out, expected)})
    return results


def mixed_metadata(shape: Shape, prefill_rows: int = 40) -> tuple[qpaged.PagedAttentionMetadata, int]:
    """Return a step of both kinds, and its number of queries.

    It prefills the last tokens of the first sequence and decodes one token of every sequence.
    """
    table, _ = shape.tables()
    decode = decode_metadata(shape)
    prefill = qpaged.PagedAttentionMetadata.prefill(
        position=shape.lengths[0] - prefill_rows + np.arange(prefill_rows),
        page_table=table[0],
        length=prefill_rows,
    )
    metadata = prefill.replace(
        decodes_position=decode.decodes_position, decodes_page_table=decode.decodes_page_table
    )
    return metadata, prefill_rows + len(shape.lengths)


def check_in_process(quantizer: str) -> list[Row] | str:
    """Run :func:`check` in a process of its own; return its results, or why there are none."""
    command = [sys.executable, __file__, "--check", quantizer]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=CHECK_SECONDS)
    except subprocess.TimeoutExpired:
        return f"no result within {CHECK_SECONDS} seconds"
    if done.returncode:
        return f"exit status {done.returncode}: {' '.join(done.stderr.split())[-300:]}"
    return json.loads(done.stdout.splitlines()[-1])


def judge_targets(runs: dict[str, list[Row]]) -> list[Row]:
    """Return each target with what was measured for it, and whether that is enough."""
    many = timed_run(runs, "64x8k", "qpaged gpu int8")
    one = timed_run(runs, "1x128k", "qpaged gpu int8")
    best = best_paged_peer(runs.get("64x8k", []))
    speedup = None
    against = ""
    if best is not None:
        against = f" ({best['name']})"
        if many is not None:
            speedup = round(best["milliseconds"] / many["milliseconds"], 3)
    return [
        target("int8 at 64x8k, of the copy's bandwidth", 0.85, many and many["of_bandwidth"]),
        target("int8 at 1x128k, of the copy's bandwidth", 0.6, one and one["of_bandwidth"]),
        target(f"int8 at 64x8k, times as fast as the best bfloat16 pages of a peer{against}", 1.7, speedup),
    ]


def timed_run(runs: dict[str, list[Row]], shape: str, name: str) -> Row | None:
    """Return the row of that name at that shape, if it was timed."""
    for run in runs.get(shape, []):
        if run["name"] == name and "bits" in run:
            return run
    return None


def best_paged_peer(runs: list[Row]) -> Row | None:
    """Return the fastest peer that reads bfloat16 pages."""
    peers = [
        run for run in runs if run.get("paged") and run["bits"] == 16 and not run["name"].startswith("qpaged")
    ]
    return min(peers, key=lambda run: run["milliseconds"], default=None)


def target(description: str, least: float, measured: float | None) -> Row:
    """Return one target as JSON."""
    met = measured is not None and measured >= least
    return {"what": description, "at least": least, "found": measured, "met": met}


def installed(names: Sequence[str]) -> list[str]:
    """Return the distributions among ``names`` that are installed."""
    versions = []
    for name in names:
        try:
            version(name)
        except PackageNotFoundError:
            continue
        versions.append(name)
    return versions


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="write the results here as JSON")
    parser.add_argument("--shapes", default=",".join(MEASURED), help="names, separated by commas")
    parser.add_argument("--formats", default=",".join(FORMATS), help="names, separated by commas")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--minutes", type=float, default=8, help="begin no shape after these")
    parser.add_argument("--check", metavar="FORMAT", help="only check one format, and print its errors")
    arguments = parser.parse_args()
    if jax.default_backend() != "gpu":
        parser.exit(1, f"gpu_attention needs a GPU, but JAX finds only {jax.devices()[0].device_kind}.\n")
    return arguments


def main() -> None:
    begin = time.monotonic()
    arguments = parse_arguments()
    if arguments.check:
        print(json.dumps(check(arguments.check)))
        return
    formats = arguments.formats.split(",")
    results: dict[str, Any] = {
        **circumstances(installed(DISTRIBUTIONS)),
        "rounds": arguments.rounds,
        "bytes_per_second": round(copy_bandwidth()),
        "checks": {quantizer: check_in_process(quantizer) for quantizer in formats},
        "shapes": {},
        "targets": [],
    }
    save(arguments.out, results)
    print(json.dumps(results, indent=1), flush=True)
    # A format whose check crashed or hung would take the whole run with it.
    checked = [quantizer for quantizer in formats if not isinstance(results["checks"][quantizer], str)]
    for name in arguments.shapes.split(","):
        if time.monotonic() - begin > 60 * arguments.minutes:
            print(f"{name}: left out, {arguments.minutes} minutes have passed")
            continue
        inputs = Inputs.random(SHAPES[name])
        candidates = [
            *gpu_peers.candidates(inputs),
            *our_candidates(inputs, formats, ("xla",)),
            *our_candidates(inputs, checked, ("gpu",)),
        ]
        rows = measure(inputs, iter(candidates), arguments.rounds, results["bytes_per_second"])
        results["shapes"][name] = rows
        results["targets"] = judge_targets(results["shapes"])
        save(arguments.out, results)
        print(name)
        for row in rows:
            print(f"  {row['name']:45s}{describe(row)}", flush=True)
    for line in results["targets"]:
        print(line)


def describe(row: Row) -> str:
    """Return a row for the terminal."""
    if "refused" in row:
        return f" {row['refused']}"
    return f"{row['milliseconds']:10.3f} ms{row['of_bandwidth']:8.0%}{row['error']:10.1e}"


if __name__ == "__main__":
    main()
