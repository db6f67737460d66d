"""Compiles decode attention for an H200 without a GPU, and records what the compiler says of it.

    python benchmarks/gpu_compile.py --out benchmarks/results/gpu_compile.json

Needs ``pip install "qpaged[cuda]"`` and absl-py. There are 32 query heads and 8 KV heads, head_dim 128, and
pages of 16 slots. Nothing runs, so there are no times.

- ``temp``: bytes of the program's temporaries in the GPU's memory.
- ``arguments``: bytes of the program's arguments: pools, scales, queries, page table.
- ``launches`` and ``bytes``, of ``xla``: kernels that a step of one layer launches, tests of loops included,
  and the bytes that they read and write, both read from the compiled program: see ``hlo_costs.py``. ``live``
  is the bytes of the codes that a step must read.
- ``registers`` and ``spilled``, of the kernels: registers of a thread, and bytes that the assembler spilled.
- ``shared``: bytes of shared memory of one program of the grid.

JAX's own kernel needs JAX 0.10; ``--formats --peer --add`` compiles it alone and adds it to the results.
"""

import argparse
import functools
import json
import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")

import jax
import jax.numpy as jnp
from hlo_costs import Program
from jax.experimental import topologies
from jax.sharding import Sharding, SingleDeviceSharding
from jax.typing import DTypeLike
from record import circumstances, save

import qpaged
from qpaged.attention import _xla_lanes

Pytree = Any
DUMP = tempfile.TemporaryDirectory()  # Mosaic GPU writes its kernels' resources here
os.environ |= {"MOSAIC_GPU_DUMP_PTXAS": "1", "MOSAIC_GPU_DUMP_TO": DUMP.name}
NAME = "NVIDIA H200"
H200 = f"""
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 4800000000000
  l2_cache_size: 62914560
  clock_rate_ghz: 1.98
  device_memory_size: 150000000000
  shared_memory_per_block_optin: 232448
  cuda_compute_capability {{ major: 9 minor: 0 }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 8 }}
device_description_str: "{NAME}"
"""
FORMATS = "plain", "int8", "int8:token", "fp8_e4m3", "int4:token", "int6:token"
BY_XLA = (*FORMATS, "int4", "int4+rotate", "nvfp4", "int2")
Q_HEADS, KV_HEADS, HEAD_DIM, PAGE_SIZE = 32, 8, 128, 16
SHAPES = {"8 x 4k": (8, 256), "64 x 8k": (64, 512), "1 x 128k": (1, 8192)}  # sequences, pages of each
POOL = 1024  # pages of the first shape's pool; the other pools have exactly the pages of their sequences


def compile_for_gpu(function: Callable[..., Any], gpu: Sharding, *arguments: Pytree) -> dict[str, Any]:
    """Compile a function and return the resources that it takes, or why JAX refuses it."""
    placed = jax.tree_util.tree_map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=gpu), arguments)
    try:
        memory = jax.jit(function).lower(*placed).compile().memory_analysis()
    except (ImportError, RuntimeError, NotImplementedError, ValueError) as error:
        return {"refused": str(error)[:200]}
    return {
        "temp": memory.temp_size_in_bytes,
        "arguments": memory.argument_size_in_bytes,
        **kernel_resources(),
    }


def kernel_resources() -> dict[str, int]:
    """Return the resources of the kernel that was compiled last, as the assembler reports them."""
    report = ""
    for path in Path(DUMP.name).iterdir():
        if path.suffix == ".ptxas" or path.name.endswith(".resources.txt"):
            report += path.read_text()
        path.unlink()
    patterns = {
        "registers": r"Used (\d+) registers",
        "spilled": r"(\d+) bytes spill stores",
        "shared": r"smem_scratch_bytes=(\d+)",
    }
    matches = {name: re.search(pattern, report) for name, pattern in patterns.items()}
    return {name: int(match.group(1)) for name, match in matches.items() if match}


def array(*shape: int, dtype: DTypeLike = jnp.int32) -> jax.ShapeDtypeStruct:
    """Return an abstract array."""
    return jax.ShapeDtypeStruct(shape, dtype)


def pool_pages(shape: str) -> int:
    """Return the pages of the pool at a shape."""
    if shape == next(iter(SHAPES)):
        return POOL
    sequences, pages = SHAPES[shape]
    return sequences * pages


def abstract_view(quantizer: str, shape: str) -> qpaged.PagedAttentionCacheView:
    """Return a view without allocating its pages."""
    sequences, pages = SHAPES[shape]
    config = qpaged.PagedAttentionCacheMetaData(
        sequences, 1, pool_pages(shape), pages, pages * PAGE_SIZE, PAGE_SIZE, KV_HEADS, HEAD_DIM, 0.5
    )
    fresh = qpaged.PagedAttentionCacheView.fresh
    return jax.eval_shape(lambda: fresh(None, jnp.bfloat16, config, 0, None, quantizer))


def attend(query, view, position, table, *, backend):
    metadata = qpaged.PagedAttentionMetadata.decode(position=position, page_table=table)
    return qpaged.paged_attention(query, view, metadata, backend=backend)


def compile_ours(gpu: Sharding, backend: str, quantizer: str, shape: str) -> dict[str, Any]:
    """Compile qpaged's decode attention."""
    sequences, pages = SHAPES[shape]
    query = array(sequences, Q_HEADS, HEAD_DIM, dtype=jnp.bfloat16)
    view = abstract_view(quantizer, shape)
    function = functools.partial(attend, backend=backend)
    arguments = (query, view, array(sequences), array(sequences, pages))
    if backend == "gpu":
        return compile_for_gpu(function, gpu, *arguments)
    placed = jax.tree_util.tree_map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=gpu), arguments)
    compiled = jax.jit(function).lower(*placed).compile()
    costs = Program.parse(compiled.as_text()).costs(lane_steps(sequences, pages))
    memory = compiled.memory_analysis()
    return {
        "temp": memory.temp_size_in_bytes,
        "arguments": memory.argument_size_in_bytes,
        "launches": costs.launches,
        "bytes": costs.bytes,
        "live": live_bytes(view) * sequences * pages // pool_pages(shape),
    }


def lane_steps(sequences: int, pages: int) -> int:
    """Return the steps of ``xla`` for sequences of so many pages each, all of them full."""
    lanes, pages_per_tile = _xla_lanes.decode_lanes(sequences, pages, PAGE_SIZE)
    kv_tiles = -(-pages // pages_per_tile)
    with jax.default_device(jax.devices("cpu")[0]):
        count = jnp.full(sequences, kv_tiles, jnp.int32)
        return int(_xla_lanes.steps_for(count, kv_tiles, min(lanes, sequences * kv_tiles)))


def live_bytes(view: qpaged.PagedAttentionCacheView) -> int:
    """Return the bytes of the codes, or of plain pages, of a whole pool, keys and values."""
    pools = view.key_pages, view.value_pages
    largest = (
        max(leaf.size * leaf.dtype.itemsize for leaf in jax.tree_util.tree_leaves(pool)) for pool in pools
    )
    return sum(largest)


def compile_peer(gpu: Sharding, dtype: str, shape: str) -> dict[str, Any]:
    """Compile JAX's own Pallas-Triton kernel over its own pools."""
    from jax.experimental.pallas.ops.gpu.paged_attention import paged_attention

    def decode(query, keys, values, table, lengths, key_scales=None, value_scales=None):
        return paged_attention(
            query, keys, values, table, lengths, k_scales_pages=key_scales, v_scales_pages=value_scales
        )

    sequences, pages = SHAPES[shape]
    slots = KV_HEADS, pool_pages(shape), PAGE_SIZE
    pool = array(*slots, HEAD_DIM, dtype=jnp.dtype(dtype))
    scales = [array(*slots, dtype=jnp.float32)] * 2 if dtype == "int8" else []
    query = array(sequences, Q_HEADS, HEAD_DIM, dtype=jnp.bfloat16)
    return compile_for_gpu(decode, gpu, query, pool, pool, array(sequences, pages), array(sequences), *scales)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="write the results here as JSON")
    parser.add_argument("--shapes", default=",".join(SHAPES), help="separated by commas")
    parser.add_argument("--formats", nargs="*", default=list(FORMATS))
    parser.add_argument("--by-xla", nargs="*", default=list(BY_XLA), help="formats that xla attends to")
    parser.add_argument("--peer", action="store_true", help="compile JAX's own kernel, too; needs JAX 0.10")
    parser.add_argument("--add", action="store_true", help="keep the runs that are already in --out")
    arguments = parser.parse_args()
    devices = topologies.get_topology_desc(
        topology_name="", platform="cuda", topology="1x1x1", target_config=H200
    ).devices
    gpu = SingleDeviceSharding(devices[0])
    runs = []
    for shape in arguments.shapes.split(","):
        kernels = [("gpu", "qpaged", name) for name in arguments.formats]
        by_xla = [("xla", "qpaged by xla", name) for name in arguments.by_xla]
        for backend, kernel, quantizer in (*kernels, *by_xla):
            run = {"shape": shape, "kernel": kernel, "format": quantizer}
            run |= compile_ours(gpu, backend, quantizer, shape)
            runs.append(run)
            print(json.dumps(run), flush=True)
        if arguments.peer:
            for dtype in ("bfloat16", "int8"):
                run = {"shape": shape, "kernel": "jax", "format": dtype}
                run |= compile_peer(gpu, dtype, shape) | {"jax": jax.__version__}
                runs.append(run)
                print(json.dumps(run), flush=True)
    if arguments.add:
        saved = json.loads(arguments.out.read_text())
        save(arguments.out, saved | {"runs": saved["runs"] + runs})
        return
    results = {
        **circumstances(["jax-cuda13-plugin", "nvidia-cuda-nvcc"]),
        "device": f"{NAME}, described",
        "unmeasured": "compiled without a GPU: no times",
        "runs": runs,
    }
    save(arguments.out, results)


if __name__ == "__main__":
    main()
