"""Decode attention on a GPU against the memory bandwidth of the same run, beside what else does it there.

    python benchmarks/gpu_attention.py --out benchmarks/results/gpu_attention.json

To be run on a Hopper GPU; it has not been yet. Under ten minutes: what `--minutes` leaves no time for is left
out, and results are saved after each shape. Needs absl-py; peers that are not installed, and whatever fails,
have a row that says why.

First every format's kernel is checked, in a process of its own that may crash or hang: the largest error
against the ``reference`` backend on the same pages, over its largest output. What finishes is measured.

Then one decode step of one layer, at the shapes of ``shapes.py``. All take turns round by round in one
process; medians over rounds, each of which is several steps sent off together. Given are the milliseconds
of a step, the bytes of the live tokens' keys and values as each stores them, those bytes over the time as a
share of what a copy of 1 GB reads and writes in the same run, and the largest error against float32 on the
same numbers, over the largest output. ``targets`` are what was aimed at, and whether it was met.
"""

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # peers need memory, too

import jax
import jax.numpy as jnp
import numpy as np
from cpu_attention import filled
from record import circumstances, save
from shapes import SHAPES, Shape

import qpaged

FORMATS = "plain", "int8", "int8:token", "fp8_e4m3", "int4:token"
MEASURED = "64x8k", "1x128k", "256x1k", "8x4k 64 dims"
CALLS = 20  # of a round, sent off one after the other
CHECK_SECONDS = 60
DISTRIBUTIONS = "torch", "triton", "flashinfer-python"
# head_dim, page_size, options
CHECKS = (
    (128, 16, {}),
    (128, 64, {"sliding_window": 300, "logits_soft_cap": 3.0, "sinks": True}),
    (64, 64, {"sliding_window": 70}),
    (256, 32, {}),
)


@dataclass
class Numbers:
    """What all attend to: bfloat16, on the device; keys and values (kv_heads, length, head_dim) each."""

    shape: Shape
    query: jax.Array
    keys: list[jax.Array]
    values: list[jax.Array]

    @classmethod
    def of(cls, shape: Shape) -> "Numbers":
        def rows(seed: int, *dims: int) -> jax.Array:
            return jax.random.normal(jax.random.key(seed), dims, jnp.bfloat16)

        query = rows(0, len(shape.lengths), shape.q_heads, shape.head_dim)
        pairs = [
            [rows(2 * row + which, shape.kv_heads, length, shape.head_dim) for which in (1, 2)]
            for row, length in enumerate(shape.lengths)
        ]
        return cls(shape, query, *(list(part) for part in zip(*pairs, strict=True)))

    def exact(self) -> np.ndarray:
        """(sequences, q_heads, head_dim) float32."""

        @jax.jit
        def attend(query, keys, values):
            query, keys, values = (x.astype(jnp.float32) for x in (query, keys, values))
            grouped = query.reshape(len(keys), -1, query.shape[-1])
            scores = jnp.einsum("hgd,hsd->hgs", grouped, keys, precision="highest") * query.shape[-1] ** -0.5
            weights = jax.nn.softmax(scores)
            return jnp.einsum("hgs,hsd->hgd", weights, values, precision="highest").reshape(query.shape)

        return np.stack([attend(*row) for row in zip(self.query, self.keys, self.values, strict=True)])


@dataclass
class Subject:
    """Something that attends.

    Attributes:
        name: what it is called, with its format.
        step: sends off one decode step, and gives its output on the device.
        wait: returns once all that was sent off is done.
        bytes_read: that a step must read.
        bits: of an element.
        paged: whether it reads pages through a table.
        calls: sends off ``CALLS`` steps.
    """

    name: str
    step: Callable[[], Any]
    wait: Callable[[Any], Any]
    bytes_read: float
    bits: int
    paged: bool = True
    calls: Callable[[], Any] | None = None
    times: list[float] = field(default_factory=list)

    def round(self) -> float:
        """Milliseconds of a step."""
        begin = time.perf_counter()
        if self.calls is not None:
            out = self.calls()
        else:
            for _ in range(CALLS):
                out = self.step()
        self.wait(out)
        return (time.perf_counter() - begin) / CALLS * 1e3


Candidates = Iterator[tuple[str, Callable[[], Subject]]]


def ours(numbers: Numbers, formats: list[str], backends: tuple[str, ...] = ("gpu", "xla")) -> Candidates:
    for format in formats:
        for backend in backends:
            yield f"qpaged {backend} {format}", functools.partial(_ours, numbers, format, backend)


def _ours(numbers: Numbers, format: str, backend: str) -> Subject:
    shape = numbers.shape
    view = filled(format, shape, numbers.keys, numbers.values)
    table, _ = shape.tables()
    metadata = qpaged.PagedAttentionMetadata.decode(position=np.array(shape.lengths) - 1, page_table=table)
    metadata = jax.device_put(metadata)
    attend = jax.jit(functools.partial(qpaged.paged_attention, backend=backend))
    share = (view.key_pages.nbytes + view.value_pages.nbytes) / (view.key_pages.size + view.value_pages.size)
    return Subject(
        f"qpaged {backend} {format}",
        lambda: attend(numbers.query, view, metadata),
        jax.block_until_ready,
        share * shape.elements,
        int(8 * share),
    )


def measured(numbers: Numbers, candidates: Candidates, rounds: int, bandwidth: float) -> list[dict[str, Any]]:
    """A row for each candidate, those that fail included."""
    exact, subjects, rows = numbers.exact(), [], []
    for name, make in candidates:
        row: dict[str, Any] = {"name": name}
        rows.append(row)
        try:
            subject = make()
            out = np.asarray(host(subject.step()), np.float32).reshape(exact.shape)
            row["error"] = float(f"{np.abs(out - exact).max() / np.abs(exact).max():.2g}")
            subject.round()
        except Exception as error:  # a peer's failure is a result, whatever it raises
            row["refused"] = reason(error)
            print(f"  {name}: {row['refused']}", file=sys.stderr, flush=True)
        else:
            subjects.append((subject, row))
    for _ in range(rounds):
        for subject, _ in subjects:
            subject.times.append(subject.round())
    for subject, row in subjects:
        median = statistics.median(subject.times)
        row |= {
            "milliseconds": round(median, 4),
            "spread": [round(min(subject.times), 4), round(max(subject.times), 4)],
            "bytes": round(subject.bytes_read),
            "bits": subject.bits,
            "paged": subject.paged,
            "of_bandwidth": round(subject.bytes_read / median * 1e3 / bandwidth, 3),
        }
    return rows


def host(out: Any) -> Any:
    """An output of JAX or of torch, in the host's memory."""
    return out if isinstance(out, jax.Array) else out.float().cpu().numpy()


def reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def copy_bandwidth(size: int = 2**30) -> float:
    """Bytes a second that a copy on the device reads and writes."""
    array = jnp.zeros(size, jnp.int8)
    copy = jax.jit(jnp.copy)
    subject = Subject("copy", lambda: copy(array), jax.block_until_ready, 2 * array.nbytes, 8)
    subject.round()
    return 2e3 * array.nbytes / statistics.median(subject.round() for _ in range(5))


def check(format: str, backend: str = "gpu") -> list[dict[str, Any]]:
    """Errors of a format's kernel against the reference on the same pages, in decode and prefill at once."""
    results = []
    for head_dim, page_size, given in CHECKS:
        shape = Shape("check", (1024, 64, 256), 8, 2, head_dim, page_size)
        numbers = Numbers.of(shape)
        view = filled(format, shape, numbers.keys, numbers.values)
        table, _ = shape.tables()
        rows = 40  # of a prefill, the first sequence's last tokens
        decode = qpaged.PagedAttentionMetadata.decode(position=np.array(shape.lengths) - 1, page_table=table)
        prefill = qpaged.PagedAttentionMetadata.prefill(
            position=shape.lengths[0] - rows + np.arange(rows), page_table=table[0], length=rows
        )
        metadata = prefill.replace(
            decodes_position=decode.decodes_position, decodes_page_table=decode.decodes_page_table
        )
        options = given | ({"sinks": jnp.arange(8, dtype=jnp.float32) - 4} if "sinks" in given else {})
        query = jax.random.normal(jax.random.key(0), (rows + 3, 8, head_dim), jnp.bfloat16)

        @functools.partial(jax.jit, static_argnames=("backend", "sliding_window", "logits_soft_cap"))
        def attend(query, view, metadata, **options):
            return qpaged.paged_attention(query, view, metadata, **options).astype(jnp.float32)

        got, want = (
            np.asarray(attend(query, view, metadata, backend=name, **options))
            for name in (backend, "reference")
        )
        error = float(f"{np.abs(got - want).max() / np.abs(want).max():.2g}")
        case = {"head_dim": head_dim, "page_size": page_size, "options": sorted(given)}
        results.append(case | {"error": error})
    return results


def checked(format: str) -> list[dict[str, Any]] | str:
    """:func:`check` in a process of its own, or why it gave nothing."""
    command = [sys.executable, __file__, "--check", format]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=CHECK_SECONDS)
    except subprocess.TimeoutExpired:
        return f"no result within {CHECK_SECONDS} seconds"
    if done.returncode:
        return f"exit status {done.returncode}: {' '.join(done.stderr.split())[-300:]}"
    return json.loads(done.stdout.splitlines()[-1])


def targets(runs: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """What the kernel was to reach, what it did, and whether that is enough."""

    def found(shape: str, name: str) -> dict[str, Any] | None:
        return next((run for run in runs.get(shape, ()) if run["name"] == name and "bits" in run), None)

    many, one = found("64x8k", "qpaged gpu int8"), found("1x128k", "qpaged gpu int8")
    peers = [
        run
        for run in runs.get("64x8k", ())
        if run.get("paged") and run["bits"] == 16 and not run["name"].startswith("qpaged")
    ]
    best = min(peers, key=lambda run: run["milliseconds"], default=None)
    aims = [
        ("int8 at 64x8k, of the copy's bandwidth", 0.85, many and many["of_bandwidth"]),
        ("int8 at 1x128k, of the copy's bandwidth", 0.6, one and one["of_bandwidth"]),
        (
            "int8 at 64x8k, times as fast as the best bfloat16 pages of a peer"
            + (f" ({best['name']})" if best else ""),
            1.7,
            many and best and round(best["milliseconds"] / many["milliseconds"], 3),
        ),
    ]
    return [
        {"what": what, "at least": least, "found": value, "met": value is not None and value >= least}
        for what, least, value in aims
    ]


def installed(names: tuple[str, ...]) -> list[str]:
    """Those of the distributions that are."""
    found = []
    for name in names:
        try:
            version(name)
        except PackageNotFoundError:
            continue
        found.append(name)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="write the results here as JSON")
    parser.add_argument("--shapes", default=",".join(MEASURED), help="names, separated by commas")
    parser.add_argument("--formats", default=",".join(FORMATS), help="names, separated by commas")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--minutes", type=float, default=8, help="begin no shape after these")
    parser.add_argument("--check", metavar="FORMAT", help="only check one format, and print what came of it")
    arguments = parser.parse_args()
    begin = time.monotonic()
    if jax.default_backend() != "gpu":
        parser.exit(1, f"gpu_attention needs a GPU, but JAX finds only {jax.devices()[0].device_kind}.\n")
    if arguments.check:
        print(json.dumps(check(arguments.check)))
        return
    import gpu_peers

    formats = arguments.formats.split(",")
    results: dict[str, Any] = {
        **circumstances(installed(DISTRIBUTIONS)),
        "rounds": arguments.rounds,
        "bytes_per_second": round(copy_bandwidth()),
        "checks": {format: checked(format) for format in formats},
        "shapes": {},
        "targets": [],
    }
    save(arguments.out, results)
    print(json.dumps(results, indent=1), flush=True)
    for name in arguments.shapes.split(","):
        if time.monotonic() - begin > 60 * arguments.minutes:
            print(f"{name}: left out, {arguments.minutes} minutes have passed")
            continue
        numbers = Numbers.of(SHAPES[name])
        runs = [format for format in formats if not isinstance(results["checks"][format], str)]
        candidates = [*gpu_peers.candidates(numbers), *ours(numbers, formats, ("xla",))]
        candidates += ours(numbers, runs, ("gpu",))
        results["shapes"][name] = measured(
            numbers, iter(candidates), arguments.rounds, results["bytes_per_second"]
        )
        results["targets"] = targets(results["shapes"])
        save(arguments.out, results)
        print(name)
        for run in results["shapes"][name]:
            print(f"  {run['name']:45s}{described(run)}", flush=True)
    for target in results["targets"]:
        print(target)


def described(run: dict[str, Any]) -> str:
    if "refused" in run:
        return f" {run['refused']}"
    return f"{run['milliseconds']:10.3f} ms{run['of_bandwidth']:8.0%}{run['error']:10.1e}"


if __name__ == "__main__":
    main()
