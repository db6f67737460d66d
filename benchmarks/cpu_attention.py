"""Attention on CPU, beside what else does it there.

    pip install torch "transformers<5" optimum-quanto hqq llama-cpp-python
    python benchmarks/cpu_attention.py --out benchmarks/results/cpu_attention.json

One decode step of one layer, or one chunk of a prompt, at the shapes of ``shapes.py``. All take turns round
by round in one process; medians over rounds. Given are the milliseconds, the bytes of the live tokens' keys
and values as each stores them, those bytes over the time as a share of what the same run reads from memory,
and the largest error against float64 on the same numbers, over the largest output. Peers that are not
installed are left out, by name. ``plain`` are bfloat16 pages as JAX holds them, ``raw`` the same bits as
integers.

Beside that, for each format, what is compiled in a generation: the seconds that a step of writing and
attending takes to compile, and how many programs a prompt and 64 steps of one shape compile.
"""

import argparse
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from record import circumstances, save
from shapes import SHAPES, Shape

import qpaged

THREADS = len(os.sched_getaffinity(0))
FORMATS = (
    "plain", "raw", "int8", "int8:token", "int8:channel", "fp8_e4m3", "int4:token", "int4", "nvfp4",
)  # fmt: skip
DISTRIBUTIONS = ("torch", "transformers", "optimum-quanto", "hqq", "llama-cpp-python")


@dataclass
class Numbers:
    """What all attend to."""

    shape: Shape
    query: np.ndarray
    keys: list[np.ndarray]
    values: list[np.ndarray]

    @classmethod
    def of(cls, shape: Shape) -> "Numbers":
        def rows(seed: int, *dims: int) -> np.ndarray:
            drawn = np.random.default_rng(seed).standard_normal(dims, np.float32)
            return np.asarray(jnp.asarray(drawn, jnp.bfloat16), np.float32)  # the same for all dtypes

        query = rows(0, shape.tokens, shape.q_heads, shape.head_dim)
        pairs = [
            [rows(2 * row + which, shape.kv_heads, length, shape.head_dim) for which in (1, 2)]
            for row, length in enumerate(shape.lengths)
        ]
        return cls(shape, query, *(list(part) for part in zip(*pairs, strict=True)))

    def exact(self) -> np.ndarray:
        """(tokens, q_heads, head_dim) float64."""
        outs = []
        for row, (keys, values) in enumerate(zip(self.keys, self.values, strict=True)):
            keys, values = keys.astype(np.float64), values.astype(np.float64)
            chunk = self.shape.chunk
            for query, unseen in zip(self.query[row * chunk :][:chunk], reversed(range(chunk)), strict=True):
                seen = slice(keys.shape[1] - unseen)
                grouped = query.reshape(self.shape.kv_heads, -1, self.shape.head_dim).astype(np.float64)
                scores = grouped @ keys[:, seen].swapaxes(1, 2) * self.shape.head_dim**-0.5
                weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
                out = weights / weights.sum(axis=-1, keepdims=True) @ values[:, seen]
                outs.append(out.reshape(query.shape))
        return np.stack(outs)


@dataclass
class Subject:
    """Something that attends: one step of it, the bytes that the step must read, and its seconds."""

    name: str
    step: Callable[[], Any]
    bytes_read: float
    times: list[float] = field(default_factory=list)


def fresh(format: str, shape: Shape, pages: int) -> qpaged.PagedAttentionCacheView:
    config = qpaged.PagedAttentionCacheMetaData(
        len(shape.lengths), 1, pages, shape.pages_per_sequence, shape.pages_per_sequence * shape.page_size,
        shape.page_size, shape.kv_heads, shape.head_dim, 0.5,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", qpaged.NarrowFloatPoolWarning)
        return qpaged.PagedAttentionCacheView.init(None, jnp.bfloat16, config, 0, None, format)


def filled(format: str, shape: Shape, keys: list[Any], values: list[Any]) -> qpaged.PagedAttentionCacheView:
    """A layer that holds keys and values, (kv_heads, length, head_dim) for each sequence."""
    table, pages = shape.tables()
    write = jax.jit(qpaged.PagedAttentionCacheView.write_prefill_to_cache, donate_argnums=0)
    view = fresh(format, shape, pages)
    for row, length in enumerate(shape.lengths):
        for start in range(0, length, 2048):
            key, value = (
                jnp.asarray(part[row][:, start : start + 2048].swapaxes(0, 1), jnp.bfloat16)
                for part in (keys, values)
            )
            metadata = qpaged.PagedAttentionMetadata.prefill(
                position=start + np.arange(len(key)), page_table=table[row]
            )
            view = write(view, key, value, metadata)
    return view


def ours(numbers: Numbers) -> Iterator[Subject]:
    shape = numbers.shape
    attend = jax.jit(qpaged.paged_attention)
    table, _ = shape.tables()
    if shape.chunk == 1:
        metadata = qpaged.PagedAttentionMetadata.decode(
            position=np.array(shape.lengths) - 1, page_table=table
        )
    else:
        position = shape.lengths[0] - shape.chunk + np.arange(shape.chunk)
        metadata = qpaged.PagedAttentionMetadata.prefill(position=position, page_table=table[0])
    query = jnp.asarray(numbers.query, jnp.bfloat16)
    for format in FORMATS:
        view = filled(format, shape, numbers.keys, numbers.values)
        share = (view.key_pages.nbytes + view.value_pages.nbytes) / (
            view.key_pages.size + view.value_pages.size
        )
        yield Subject(
            f"qpaged {format}",
            lambda view=view: attend(query, view, metadata).block_until_ready(),
            share * shape.elements,
        )


def of_jax(numbers: Numbers) -> Iterator[Subject]:
    """``jax.nn.dot_product_attention`` over a contiguous cache."""
    shape = numbers.shape
    tokens = (len(shape.lengths), shape.chunk, shape.q_heads, shape.head_dim)
    query = jnp.asarray(numbers.query.reshape(tokens), jnp.bfloat16)
    keys, values = (
        jnp.asarray(padded(part).swapaxes(1, 2), jnp.bfloat16) for part in (numbers.keys, numbers.values)
    )
    lengths = jnp.asarray(shape.lengths, jnp.int32)

    @jax.jit
    def attend(query, keys, values, lengths):
        causal = jnp.tril(jnp.ones((shape.chunk, keys.shape[1]), bool), keys.shape[1] - shape.chunk)
        seen = {"key_value_seq_lengths": lengths} if shape.chunk == 1 else {"mask": causal[None, None]}
        return jax.nn.dot_product_attention(query, keys, values, **seen).reshape(numbers.query.shape)

    yield Subject(
        "jax.nn.dot_product_attention bfloat16",
        lambda: attend(query, keys, values, lengths).block_until_ready(),
        2.0 * shape.elements,
    )


def padded(parts: list[np.ndarray]) -> np.ndarray:
    """(sequences, kv_heads, longest, head_dim), zeros past each length."""
    longest = max(part.shape[1] for part in parts)
    return np.stack([np.pad(part, ((0, 0), (0, longest - part.shape[1]), (0, 0))) for part in parts])


def of_torch(numbers: Numbers) -> Iterator[Subject]:
    """``scaled_dot_product_attention`` over contiguous caches, heads grouped and, for one token, as rows;
    where lengths differ, sequence by sequence."""
    import torch

    torch.set_num_threads(THREADS)
    shape, attend = numbers.shape, torch.nn.functional.scaled_dot_product_attention
    rows = range(len(shape.lengths))
    groups = [list(rows)] if len(set(shape.lengths)) == 1 else [[row] for row in rows]
    queries = numbers.query.reshape(len(rows), shape.chunk, shape.q_heads, shape.head_dim).swapaxes(1, 2)
    longest = max(shape.lengths)
    causal = torch.ones(shape.chunk, longest, dtype=torch.bool).tril(longest - shape.chunk)
    seen = None if shape.chunk == 1 else causal
    for dtype in (torch.float32, torch.bfloat16):
        name = f"torch SDPA {str(dtype).removeprefix('torch.')}"
        calls = [
            [
                torch.tensor(part).to(dtype)
                for part in (
                    queries[group],
                    *(np.stack([part[row] for row in group]) for part in (numbers.keys, numbers.values)),
                )
            ]
            for group in groups
        ]

        def grouped(calls=calls) -> Any:
            outs = [attend(q, k, v, attn_mask=seen, enable_gqa=True).transpose(1, 2) for q, k, v in calls]
            return torch.cat(outs).float().numpy().reshape(numbers.query.shape)

        def as_rows(calls=calls) -> Any:
            outs = [
                attend(q.reshape(len(q), shape.kv_heads, -1, shape.head_dim), k, v).reshape(q.shape)
                for q, k, v in calls
            ]
            return torch.cat(outs).float().numpy().reshape(numbers.query.shape)

        read = calls[0][0].itemsize * shape.elements
        yield Subject(f"{name} enable_gqa", grouped, read)
        if shape.chunk == 1:
            yield Subject(f"{name} heads as rows", as_rows, read)


def of_transformers(numbers: Numbers) -> Iterator[Subject]:
    """For a single token: ``QuantizedCache.update`` with it, and SDPA over what it gives back."""
    import torch
    from transformers import LlamaConfig
    from transformers.cache_utils import QuantizedCache

    shape = numbers.shape
    if len(set(shape.lengths)) > 1 or shape.chunk > 1:
        return
    config = LlamaConfig(
        num_hidden_layers=1, num_attention_heads=shape.q_heads, num_key_value_heads=shape.kv_heads,
        hidden_size=shape.q_heads * shape.head_dim, head_dim=shape.head_dim,
    )  # fmt: skip
    keys, values = (torch.tensor(np.stack(part)).bfloat16() for part in (numbers.keys, numbers.values))
    query = torch.tensor(numbers.query)[:, :, None].bfloat16()
    for backend, package in (("quanto", "optimum-quanto"), ("hqq", "hqq")):
        if find_spec("optimum" if backend == "quanto" else "hqq") is None:
            missing(package)
            continue
        axis = {"quanto": 0, "hqq": 1}[backend]
        cache = QuantizedCache(
            backend, config, nbits=4, axis_key=axis, axis_value=axis, q_group_size=64, residual_length=128
        )
        cache.update(keys[:, :, :-1], values[:, :, :-1], 0)

        def step(cache=cache) -> Any:
            k, v = cache.update(keys[:, :, -1:], values[:, :, -1:], 0)
            out = torch.nn.functional.scaled_dot_product_attention(
                query, k[:, :, : keys.shape[2]], v[:, :, : keys.shape[2]], enable_gqa=True
            )
            return out[:, :, 0].float().numpy()

        yield Subject(f"transformers QuantizedCache {backend} 4 bits", step, 0.5 * shape.elements)


def of_ggml(numbers: Numbers) -> Iterator[Subject]:
    import ggml

    if numbers.shape.chunk > 1:
        return
    for kind, bits in (("f16", 16), ("q8_0", 8.5)):
        step = ggml.attention(numbers.query, numbers.keys, numbers.values, kind, THREADS)
        yield Subject(f"ggml flash_attn_ext {kind}", step, bits / 8 * numbers.shape.elements)


PEERS = {
    of_jax: "jax",
    of_torch: "torch",
    of_transformers: "transformers",
    of_ggml: "llama_cpp",
}


def missing(package: str) -> None:
    print(f"left out: {package} is not installed", file=sys.stderr)


def processor() -> dict[str, Any]:
    """The processor's name, and what it has for narrow numbers, as Linux tells."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    told = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    narrow = ("avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16")
    return {"name": told.get("model name"), "has": [f for f in narrow if f in told.get("flags", "").split()]}


def memory_bandwidth(rounds: int = 5) -> float:
    """Bytes a second that all threads together read from memory: the sum of 512 MB, the best of rounds."""
    numbers = jnp.ones(2**27, jnp.float32)
    total = jax.jit(lambda x: x.reshape(64, -1).sum(axis=1))
    total(numbers).block_until_ready()
    times = []
    for _ in range(rounds):
        begin = time.perf_counter()
        total(numbers).block_until_ready()
        times.append(time.perf_counter() - begin)
    return numbers.nbytes / min(times)


def generation(format: str, shape: Shape, steps: int = 64) -> dict[str, Any]:
    """What is compiled from a prompt's write to the last of so many decode steps of a batch."""
    compiled: list[float] = []

    def listen(event: str, seconds: float, **_: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(seconds)

    @jax.jit
    def prefill(view, rows, metadata):
        return view.write_prefill_to_cache(rows, rows, metadata)

    @jax.jit
    def decode(view, query, rows, metadata):
        view = view.write_decodes_to_cache(rows, rows, metadata)
        return view, qpaged.paged_attention(query, view, metadata)

    table, pages = shape.tables()
    view = fresh(format, shape, pages)
    prompt = jnp.ones((min(shape.lengths) - steps, shape.kv_heads, shape.head_dim), jnp.bfloat16)
    query, rows = (
        jnp.ones((len(shape.lengths), heads, shape.head_dim), jnp.bfloat16)
        for heads in (shape.q_heads, shape.kv_heads)
    )
    at = np.full(len(shape.lengths), len(prompt), np.int32)
    prompts = [
        qpaged.PagedAttentionMetadata.prefill(position=np.arange(len(prompt)), page_table=row)
        for row in table
    ]
    metadata = [qpaged.PagedAttentionMetadata.decode(position=at + i, page_table=table) for i in range(steps)]
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        for each in prompts:
            view = prefill(view, prompt, each)
        of_prompt = len(compiled)
        view, out = decode(view, query, rows, metadata[0])
        first = compiled[of_prompt:]
        for each in metadata[1:]:
            view, out = decode(view, query, rows, each)
        out.block_until_ready()
    finally:
        jax.monitoring.clear_event_listeners()
    return {
        "name": format,
        "step_compile_seconds": round(sum(first), 3),
        "programs": {
            "prompts": of_prompt,
            "first step": len(first),
            "other steps": len(compiled) - of_prompt - len(first),
        },
    }


def measure(shape: Shape, rounds: int, bandwidth: float) -> list[dict[str, Any]]:
    numbers = Numbers.of(shape)
    exact = numbers.exact()
    subjects = list(ours(numbers))
    for peer, package in PEERS.items():
        if find_spec(package) is None:
            missing(package)
        else:
            subjects += peer(numbers)
    errors = [np.abs(np.asarray(s.step(), np.float64) - exact).max() / np.abs(exact).max() for s in subjects]
    for turn in range(rounds):
        for number, subject in enumerate(subjects):
            place = f"{shape.name}: round {turn + 1} of {rounds}, {number + 1} of {len(subjects)}"
            print(f"\r{place} ", end="", file=sys.stderr, flush=True)
            begin = time.perf_counter()
            subject.step()
            subject.times.append(1e3 * (time.perf_counter() - begin))
    print(file=sys.stderr)
    return [
        {
            "name": subject.name,
            "milliseconds": round(statistics.median(subject.times), 3),
            "spread": [round(min(subject.times), 3), round(max(subject.times), 3)],
            "bytes": round(subject.bytes_read),
            "of_bandwidth": round(subject.bytes_read / statistics.median(subject.times) * 1e3 / bandwidth, 3),
            "error": float(f"{error:.2g}"),
        }
        for subject, error in zip(subjects, errors, strict=True)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="write the results here as JSON")
    parser.add_argument("--shapes", default=",".join(list(SHAPES)[:9]), help="names, separated by commas")
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    bandwidth = memory_bandwidth()
    print(f"memory is read at {bandwidth / 1e9:.1f} GB/s by {THREADS} threads")
    runs = {}
    for name in arguments.shapes.split(","):
        runs[name] = measure(SHAPES[name], arguments.rounds, bandwidth)
        print(name)
        for run in runs[name]:
            numbers = f"{run['milliseconds']:10.2f} ms{run['of_bandwidth']:8.0%}{run['error']:10.1e}"
            print(f"  {run['name']:45s}{numbers}")
    generations = [generation(format, SHAPES["8x1k"]) for format in FORMATS]
    for each in generations:
        print(f"  {each['name']:45s}{each['step_compile_seconds']:10.2f} s  {each['programs']}")
    packages = [name for name in DISTRIBUTIONS if find_spec(name.replace("-", "_").split("_python")[0])]
    results = {
        **circumstances(packages),
        "processor": processor(),
        "threads": THREADS,
        "rounds": arguments.rounds,
        "bytes_per_second": round(bandwidth),
        "shapes": runs,
        "generation": generations,
    }
    save(arguments.out, results)


if __name__ == "__main__":
    main()
