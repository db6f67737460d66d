"""Decode attention on a GPU against the memory bandwidth of the same run, beside JAX's own kernel.

    python benchmarks/gpu_attention.py --out benchmarks/results/gpu_attention.json

To be run on a Hopper GPU; it has not been yet. 32 query heads and 8 KV heads, head_dim 128, pages of 16,
bfloat16 queries. Medians of interleaved rounds, milliseconds. ``of_bandwidth`` is the bytes of codes and
scales that a step must read, over its time, as a fraction of what a copy of 1 GB reaches (read and written).
"""

import argparse
import functools
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from record import circumstances, save

import qpaged

Q_HEADS, KV_HEADS, HEAD_DIM, PAGE_SIZE = 32, 8, 128, 16
SHAPES = {"64 x 8k": (64, 512), "1 x 128k": (1, 8192)}  # sequences, pages of each
FORMATS = "plain", "int8", "int8:token", "fp8_e4m3", "int4:token"
CALLS = 20  # of a round, one after the other


def round_of(function: Callable[..., Any], *arguments: Any) -> float:
    """Milliseconds of a call."""
    begin = time.perf_counter()
    for _ in range(CALLS):
        out = function(*arguments)
    jax.block_until_ready(out)
    return (time.perf_counter() - begin) / CALLS * 1e3


def table_of(shape: str) -> Any:
    sequences, pages = SHAPES[shape]
    order = np.random.default_rng(0).permutation(sequences * pages)
    return jnp.asarray(order.reshape(sequences, pages), jnp.int32)


def ours(shape: str, format: str, backend: str, query: Any) -> tuple[Callable[[], Any], int]:
    """A decode step over full sequences, and the bytes of the pools."""
    sequences, pages = SHAPES[shape]
    config = qpaged.PagedAttentionCacheMetaData(
        sequences, 1, sequences * pages, pages, pages * PAGE_SIZE, PAGE_SIZE, KV_HEADS, HEAD_DIM, 0.5
    )
    view = qpaged.PagedAttentionCacheView.fresh(None, jnp.bfloat16, config, 0, None, format)
    metadata = qpaged.PagedAttentionMetadata.decode(
        position=np.full(sequences, pages * PAGE_SIZE - 1), page_table=table_of(shape)
    )
    step = jax.jit(lambda query, view: qpaged.paged_attention(query, view, metadata, backend=backend))
    return lambda: step(query, view), sum(x.nbytes for x in jax.tree_util.tree_leaves(view))


def peer(shape: str, format: str, query: Any) -> tuple[Callable[[], Any], int]:
    """JAX's own Pallas-Triton kernel."""
    from jax.experimental.pallas.ops.gpu.paged_attention import paged_attention

    sequences, pages = SHAPES[shape]
    slots = KV_HEADS, sequences * pages, PAGE_SIZE
    pool = jnp.zeros((*slots, HEAD_DIM), format)
    scales = jnp.ones(slots, jnp.float32) if format == "int8" else None
    lengths = jnp.full(sequences, pages * PAGE_SIZE, jnp.int32)
    step = jax.jit(
        lambda *given: paged_attention(*given[:5], k_scales_pages=given[5], v_scales_pages=given[5])
    )
    given = query, pool, pool, table_of(shape), lengths, scales
    return lambda: step(*given), 2 * (pool.nbytes + (0 if scales is None else scales.nbytes))


def copy_bandwidth() -> float:
    """Bytes a millisecond that a copy on the device reads and writes."""
    array = jnp.zeros(2**30, jnp.int8)
    copy = jax.jit(jnp.copy)
    jax.block_until_ready(copy(array))
    return 2 * array.nbytes / statistics.median(round_of(copy, array) for _ in range(5))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="write the results here as JSON")
    parser.add_argument("--formats", nargs="+", default=list(FORMATS))
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    if jax.default_backend() != "gpu":
        parser.exit(1, f"gpu_attention needs a GPU, but JAX finds only {jax.devices()[0].device_kind}.\n")
    bandwidth, runs = copy_bandwidth(), []
    for shape, (sequences, _) in SHAPES.items():
        query = jax.random.normal(jax.random.key(0), (sequences, Q_HEADS, HEAD_DIM), jnp.bfloat16)
        made: dict[tuple[str, str], Callable[[], tuple[Callable[[], Any], int]]] = {}
        for format in arguments.formats:
            made["gpu", format] = functools.partial(ours, shape, format, "gpu", query)
            made["xla", format] = functools.partial(ours, shape, format, "xla", query)
        for format in ("bfloat16", "int8"):
            made["jax", format] = functools.partial(peer, shape, format, query)
        steps = {}
        for name, make in made.items():
            try:
                steps[name] = make()
                jax.block_until_ready(steps[name][0]())
            except (ImportError, RuntimeError, ValueError, NotImplementedError) as error:
                steps.pop(name, None)
                runs.append(
                    {"shape": shape, "kernel": name[0], "format": name[1], "refused": str(error)[:200]}
                )
        times: dict[tuple[str, str], list[float]] = {name: [] for name in steps}
        for _ in range(arguments.rounds):
            for name, (step, _) in steps.items():
                times[name].append(round_of(step))
        for name, (_, moved) in steps.items():
            median = statistics.median(times[name])
            runs.append({
                "shape": shape, "kernel": name[0], "format": name[1], "ms": round(median, 4),
                "spread": [round(min(times[name]), 4), round(max(times[name]), 4)], "bytes": moved,
                "of_bandwidth": round(moved / median / bandwidth, 3),
            })  # fmt: skip
            print(runs[-1], flush=True)
    save(arguments.out, {**circumstances(), "copy_bytes_per_ms": round(bandwidth), "runs": runs})


if __name__ == "__main__":
    main()
