"""What the TPU compiler makes of decode attention and of the decode write, with no TPU there.

    python benchmarks/tpu_compile.py --out benchmarks/results/tpu_compile.json

Needs libtpu (``pip install "qpaged[tpu]"``). 8 sequences of 4096 tokens, 32 query heads and 8 KV heads,
head_dim 128, 256 pages of 16 for each sequence, in pools of 1024 pages and of 65,536.

- ``temp``: temporaries of the program in HBM, bytes. What is small enough for a chip's fast memory does not
  count; what is made of a whole pool shows in ``temp_large``, of the large pool.
- ``copied``: bytes that the kernel copies from HBM, over those of codes and scales of the pages that hold
  tokens. The copies that it starts are counted, interpreted, in a batch of 4096, 256, 256, 256, 250, 241, 100
  and 17 tokens; a query and its output are not among them. For JAX's kernel it follows from its scales.
- ``alias``: bytes of the pools that a write updates in place, over those of the pools.
"""

import argparse
import dataclasses
import json
import math
import os
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
from jax.sharding import SingleDeviceSharding
from record import circumstances, save

import qpaged

CHIPS = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "TPU7x": "tpu7x:2x2x1"}
FORMATS = (
    "plain", "raw", "int8", "int8:token", "int8:channel", "int8:token+offset", "int8:channel+offset",
    "fp8_e4m3", "fp8_e5m2:channel", "int4:page", "int4:token", "int4:channel", "int4",
)  # fmt: skip
SEQUENCES, Q_HEADS, KV_HEADS, HEAD_DIM, PAGE_SIZE, TABLE = 8, 32, 8, 128, 16, 256
SMALL, LARGE = 1024, 65_536  # pages
RAGGED = 4096, 256, 256, 256, 250, 241, 100, 17  # tokens of the sequences whose copies are counted


def chip_of(name: str) -> Any:
    devices = topologies.get_topology_desc(platform="tpu", topology_name=CHIPS[name]).devices
    return SingleDeviceSharding(devices[0])


def compiled(function: Any, chip: Any, *arguments: Any, **options: Any) -> Any:
    """The memory of ``function``, compiled for the chip."""
    placed = jax.tree_util.tree_map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=chip), arguments
    )
    return jax.jit(function, **options).lower(*placed).compile().memory_analysis()


def array(*shape: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def view_of(format: str, pages: int, head_dim: int = HEAD_DIM) -> qpaged.PagedAttentionCacheView:
    config = qpaged.PagedAttentionCacheMetaData(
        SEQUENCES, 1, pages, TABLE, TABLE * PAGE_SIZE, PAGE_SIZE, KV_HEADS, head_dim, 0.5
    )
    fresh = qpaged.PagedAttentionCacheView.fresh
    return jax.eval_shape(lambda: fresh(None, jnp.bfloat16, config, 0, None, format))


def attend(query, view, position, table):
    metadata = qpaged.PagedAttentionMetadata.decode(position=position, page_table=table)
    return qpaged.paged_attention(query, view, metadata)


def write(view, rows, position, table):
    metadata = qpaged.PagedAttentionMetadata.decode(position=position, page_table=table)
    return view.write_decodes_to_cache(rows, rows, metadata)


STEP = array(SEQUENCES), array(SEQUENCES, TABLE)


def measure(chip: Any, format: str) -> dict[str, Any]:
    """One format: attention, and the write."""
    query = array(SEQUENCES, Q_HEADS, HEAD_DIM, dtype=jnp.bfloat16)
    rows = array(SEQUENCES, KV_HEADS, HEAD_DIM, dtype=jnp.bfloat16)
    views = [view_of(format, pages) for pages in (SMALL, LARGE)]
    attention = [compiled(attend, chip, query, view, *STEP) for view in views]
    writes = [compiled(write, chip, view, rows, *STEP, donate_argnums=0) for view in views]
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
class Counted:
    """A copy that says its size when it starts."""

    copy: Any
    size: int
    sizes: list[int]

    def start(self) -> None:
        jax.debug.callback(lambda: self.sizes.append(self.size))
        self.copy.start()

    def wait(self) -> None:
        self.copy.wait()


def copied(format: str, lengths: tuple[int, ...] = RAGGED) -> float:
    """What attention over sequences of these lengths copies from HBM, over what their pages hold."""
    make, sizes = pltpu.make_async_copy, []

    def counted(source, target, semaphore):
        size = math.prod(target.shape) * target.dtype.itemsize
        return Counted(make(source, target, semaphore), size, sizes)

    view = jax.tree_util.tree_map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), view_of(format, SMALL))
    pages = [-(-length // PAGE_SIZE) for length in lengths]
    ends = np.cumsum(pages)
    table = np.full((len(lengths), TABLE), SMALL, np.int32)
    for row, (count, end) in enumerate(zip(pages, ends, strict=True)):
        table[row, :count] = np.arange(end - count, end)
    metadata = qpaged.PagedAttentionMetadata.decode(position=np.array(lengths) - 1, page_table=table)
    query = jnp.zeros((len(lengths), Q_HEADS, HEAD_DIM), jnp.bfloat16)
    with mock.patch.object(pltpu, "make_async_copy", counted), pltpu.force_tpu_interpret_mode():
        program = jax.jit(lambda *call: qpaged.paged_attention(*call, backend="tpu"))
        program(query, view, metadata).block_until_ready()
        jax.effects_barrier()
    held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree_util.tree_leaves(view)) // SMALL
    return sum(sizes) / (held * sum(pages))


def jax_kernel(chip: Any, quantized: bool) -> dict[str, Any]:
    """JAX's own kernel on its own pools, at the pool of 1024 pages and at the large one."""

    def decode(query, keys, values, lengths, table):
        return paged_attention(query, keys, values, lengths, table, pages_per_compute_block=8)

    def pool(pages):
        shape = KV_HEADS, pages, PAGE_SIZE, HEAD_DIM
        if not quantized:
            return array(*shape, dtype=jnp.bfloat16)
        codes, scales = array(*shape, dtype=jnp.int8), array(*shape[:-1], 1, dtype=jnp.float32)
        return quantization_utils.QuantizedTensor(codes, scales)

    query = array(SEQUENCES, Q_HEADS, HEAD_DIM, dtype=jnp.bfloat16)
    memory = [compiled(decode, chip, query, pool(n), pool(n), *STEP) for n in (SMALL, LARGE)]
    # A float32 scale is brought for every code of the quantized pages, where one for each slot is stored.
    copied = (1 + 4) / (1 + 4 / HEAD_DIM) if quantized else 1.0
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
    arguments = parser.parse_args()
    runs = []
    shares = {format: round(copied(format), 3) for format in arguments.formats}  # whichever the chip
    for name in arguments.chips:
        chip = chip_of(name)
        for format in arguments.formats:
            measured = measure(chip, format)
            measured["attention"]["copied"] = shares[format]
            runs.append({"chip": name, "kernel": "qpaged", "format": format, **measured})
            print(json.dumps(runs[-1]), flush=True)
        for format, quantized in (("bfloat16", False), ("int8", True)):
            runs.append({"chip": name, "kernel": "jax", "format": format, **jax_kernel(chip, quantized)})
            print(json.dumps(runs[-1]), flush=True)
    shape = {
        "sequences": SEQUENCES, "q_heads": Q_HEADS, "kv_heads": KV_HEADS, "head_dim": HEAD_DIM,
        "page_size": PAGE_SIZE, "pages_per_sequence": TABLE, "pages": [SMALL, LARGE],
    }  # fmt: skip
    save(arguments.out, {**circumstances(["libtpu"]), "shape": shape, "runs": runs})


if __name__ == "__main__":
    main()
