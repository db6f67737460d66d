"""Compiles attention and writes for TPUs without a TPU, and records their memory traffic.

    python benchmarks/tpu_compile.py --out benchmarks/results/tpu_compile.json
    python benchmarks/tpu_compile.py --ragged --formats plain int8 int8:token int4:token \
        --out benchmarks/results/tpu_ragged.json

The steps are decodes, or with ``--ragged`` batches of 512 tokens, however the sequences share them.

Needs libtpu (``pip install "qpaged[tpu]"``). There are 8 sequences of 4096 tokens, 32 query heads and 8 KV
heads, and head_dim 128, in pools of 1024 pages and of 65,536. A page has 16 slots; 32 for ``int5`` and
``int3``, of which 16 do not fill a TPU's rows.

- ``temp``: bytes of the program's temporaries in HBM; temporaries in a chip's fast memory do not count.
  ``temp_large`` is the same for the large pool, which shows temporaries that grow with the pool.
- ``copied``: bytes that the kernel copies from HBM, over the bytes of the pages that hold tokens, scales
  included. The interpreter counts the copies that it starts in a batch of 4096, 256, 256, 256, 250, 241, 100
  and 17 tokens, without queries and outputs; not for exact pages, which two kernels share. For JAX's
  kernel it follows from how it stores scales.
- ``alias``: the share of the pools' bytes that a write updates in place.
"""

import argparse
import dataclasses
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas.ops.tpu.paged_attention import paged_attention, quantization_utils
from jax.sharding import Sharding, SingleDeviceSharding
from jax.typing import DTypeLike
from record import circumstances, save

import qpaged

Pytree = Any
CHIPS = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "TPU7x": "tpu7x:2x2x1"}
FORMATS = (
    "plain", "raw", "int8", "int8:token", "int8:channel", "int8:token+offset", "int8:channel+offset",
    "fp8_e4m3", "fp8_e5m2:channel", "int4:page", "int4:token", "int4:channel", "int4",
    "int6:token", "int6:channel", "int5:token", "int3:channel", "lloyd4+rotate", "lloyd2+rotate",
    "trellis2+rotate", "trellis3+rotate",
    "int4:token+exact128",
)  # fmt: skip
SEQUENCES, TOKENS, Q_HEADS, KV_HEADS, HEAD_DIM, PAGE_SIZE = 8, 4096, 32, 8, 128, 16
LARGER_PAGES = {"int5:token": 32, "int3:channel": 32, "trellis3+rotate": 32}  # slots
BATCH_TOKENS = 512  # of a ragged batch
SMALL, LARGE = 1024, 65_536  # pages
RAGGED = 4096, 256, 256, 256, 250, 241, 100, 17  # tokens of the sequences whose copies are counted


def chip_sharding(name: str) -> Sharding:
    """Return the sharding that places arrays on the first core of a described chip."""
    devices = topologies.get_topology_desc(platform="tpu", topology_name=CHIPS[name]).devices
    return SingleDeviceSharding(devices[0])


def compiled_memory(function: Callable[..., Any], chip: Sharding, *arguments: Pytree, **options: Any) -> Any:
    """Compile a function for the chip and return XLA's analysis of its memory."""
    placed = jax.tree_util.tree_map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=chip), arguments
    )
    return jax.jit(function, **options).lower(*placed).compile().memory_analysis()


def array(*shape: int, dtype: DTypeLike = jnp.int32) -> jax.ShapeDtypeStruct:
    """Return an abstract array."""
    return jax.ShapeDtypeStruct(shape, dtype)


def page_size(quantizer: str) -> int:
    """Return the slots of a page of the format."""
    return LARGER_PAGES.get(quantizer, PAGE_SIZE)


def abstract_view(quantizer: str, pages: int) -> qpaged.PagedAttentionCacheView:
    """Return a view without allocating its pages."""
    slots = page_size(quantizer)
    config = qpaged.PagedAttentionCacheMetaData(
        SEQUENCES, 1, pages, TOKENS // slots, TOKENS, slots, KV_HEADS, HEAD_DIM, 0.5
    )
    fresh = qpaged.PagedAttentionCacheView.fresh
    return jax.eval_shape(lambda: fresh(None, jnp.bfloat16, config, 0, None, quantizer))


def write(view, rows, step):
    return view.write_to_cache(rows, rows, step)


def abstract_step(page_size: int, ragged: bool) -> qpaged.PagedAttentionMetadata:
    """Return the metadata of a step without its values."""
    table = array(SEQUENCES, TOKENS // page_size)
    if not ragged:
        return jax.eval_shape(
            lambda position, table: qpaged.PagedAttentionMetadata.decode(position=position, page_table=table),
            array(SEQUENCES),
            table,
        )
    return jax.eval_shape(
        lambda position, tables, starts: qpaged.PagedAttentionMetadata.ragged(
            position=position, page_tables=tables, starts=starts
        ),
        array(BATCH_TOKENS),
        table,
        array(SEQUENCES + 1),
    )


def measure(chip: Sharding, quantizer: str, ragged: bool = False) -> dict[str, Any]:
    """Compile a format's attention and write at both pool sizes."""
    tokens = BATCH_TOKENS if ragged else SEQUENCES
    query = array(tokens, Q_HEADS, HEAD_DIM, dtype=jnp.bfloat16)
    rows = array(tokens, KV_HEADS, HEAD_DIM, dtype=jnp.bfloat16)
    views = [abstract_view(quantizer, pages) for pages in (SMALL, LARGE)]
    step = abstract_step(page_size(quantizer), ragged)
    attention = [compiled_memory(qpaged.paged_attention, chip, query, view, step) for view in views]
    writes = [compiled_memory(write, chip, view, rows, step, donate_argnums=0) for view in views]
    pools = sum(x.size * x.dtype.itemsize for x in jax.tree_util.tree_leaves(views[0]))
    return {
        "attention": {
            "temp": attention[0].temp_size_in_bytes,
            "temp_large": attention[1].temp_size_in_bytes,
        },
        "write": {
            "temp": writes[0].temp_size_in_bytes,
            "temp_large": writes[1].temp_size_in_bytes,
            "alias": round(writes[0].alias_size_in_bytes / pools, 3),
        },
    }


@dataclasses.dataclass
class CountedCopy:
    """A copy that records its size when it starts."""

    copy: Any
    size: int
    sizes: list[int]

    def start(self) -> None:
        jax.debug.callback(lambda: self.sizes.append(self.size))
        self.copy.start()

    def wait(self) -> None:
        self.copy.wait()


def copied_share(quantizer: str, lengths: tuple[int, ...] = RAGGED) -> float:
    """Return the bytes that attention copies from HBM over the bytes of the sequences' pages."""
    make_async_copy = pltpu.make_async_copy
    sizes: list[int] = []

    def make_counted_copy(source, target, semaphore):
        size = math.prod(target.shape) * target.dtype.itemsize
        return CountedCopy(make_async_copy(source, target, semaphore), size, sizes)

    abstract = abstract_view(quantizer, SMALL)
    view = jax.tree_util.tree_map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), abstract)
    slots = page_size(quantizer)
    pages = [-(-length // slots) for length in lengths]
    ends = np.cumsum(pages)
    table = np.full((len(lengths), TOKENS // slots), SMALL, np.int32)
    for row, (count, end) in enumerate(zip(pages, ends, strict=True)):
        table[row, :count] = np.arange(end - count, end)
    metadata = qpaged.PagedAttentionMetadata.decode(position=np.array(lengths) - 1, page_table=table)
    query = jnp.zeros((len(lengths), Q_HEADS, HEAD_DIM), jnp.bfloat16)
    with mock.patch.object(pltpu, "make_async_copy", make_counted_copy), pltpu.force_tpu_interpret_mode():
        program = jax.jit(lambda *call: qpaged.paged_attention(*call, backend="tpu"))
        program(query, view, metadata).block_until_ready()
        jax.effects_barrier()
    page_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree_util.tree_leaves(view)) // SMALL
    return sum(sizes) / (page_bytes * sum(pages))


def measure_jax_kernel(chip: Sharding, quantized: bool) -> dict[str, Any]:
    """Compile JAX's own kernel over its own pools, small and large."""

    def decode(query, keys, values, lengths, table):
        return paged_attention(query, keys, values, lengths, table, pages_per_compute_block=8)

    def pool(pages):
        shape = KV_HEADS, pages, PAGE_SIZE, HEAD_DIM
        if not quantized:
            return array(*shape, dtype=jnp.bfloat16)
        codes = array(*shape, dtype=jnp.int8)
        scales = array(*shape[:-1], 1, dtype=jnp.float32)
        return quantization_utils.QuantizedTensor(codes, scales)

    query = array(SEQUENCES, Q_HEADS, HEAD_DIM, dtype=jnp.bfloat16)
    step = array(SEQUENCES), array(SEQUENCES, TOKENS // PAGE_SIZE)
    memory = [
        compiled_memory(decode, chip, query, pool(pages), pool(pages), *step) for pages in (SMALL, LARGE)
    ]
    copied = 1.0
    if quantized:
        # The kernel broadcasts scales: it copies a float32 for every int8 code, not one for each slot.
        copied = (1 + 4) / (1 + 4 / HEAD_DIM)
    return {
        "attention": {
            "temp": memory[0].temp_size_in_bytes,
            "temp_large": memory[1].temp_size_in_bytes,
            "copied": round(copied, 3),
        }
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="write the results here as JSON")
    parser.add_argument("--chips", nargs="+", choices=CHIPS, default=list(CHIPS))
    parser.add_argument("--formats", nargs="+", default=list(FORMATS))
    parser.add_argument("--ragged", action="store_true", help="compile ragged batches instead of decodes")
    arguments = parser.parse_args()
    runs = []
    # The copies are the same on every chip.
    packed = [
        quantizer for quantizer in arguments.formats if "+exact" not in quantizer and not arguments.ragged
    ]
    shares = {quantizer: round(copied_share(quantizer), 3) for quantizer in packed}
    for name in arguments.chips:
        chip = chip_sharding(name)
        for quantizer in arguments.formats:
            measured = measure(chip, quantizer, arguments.ragged)
            measured["attention"]["copied"] = shares.get(quantizer)
            of_format = {"format": quantizer, "page_size": page_size(quantizer)}
            runs.append({"chip": name, "kernel": "qpaged", **of_format, **measured})
            print(json.dumps(runs[-1]), flush=True)
        if arguments.ragged:
            continue
        for dtype, quantized in (("bfloat16", False), ("int8", True)):
            measured = measure_jax_kernel(chip, quantized)
            of_format = {"format": dtype, "page_size": PAGE_SIZE}
            runs.append({"chip": name, "kernel": "jax", **of_format, **measured})
            print(json.dumps(runs[-1]), flush=True)
    shape = {
        "sequences": SEQUENCES, "tokens": TOKENS, "q_heads": Q_HEADS, "kv_heads": KV_HEADS,
        "head_dim": HEAD_DIM, "pages": [SMALL, LARGE],
    }  # fmt: skip
    save(arguments.out, {**circumstances(["libtpu"]), "shape": shape, "runs": runs})


if __name__ == "__main__":
    main()
