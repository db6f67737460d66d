"""What XLA's GPU compiler makes of decode attention for an H200, with no GPU there. No times: unmeasured.

    python benchmarks/gpu_compile.py --out benchmarks/results/gpu_compile.json

Needs ``pip install "qpaged[cuda]"`` and absl-py. 32 query heads and 8 KV heads, head_dim 128, pages of 16.

- ``temp``: temporaries of the program in the GPU's memory, bytes.
- ``arguments``: bytes of what the program is given: pools, scales, queries, page table.
- ``registers`` and ``spilled``: registers of a thread, and bytes of them that the assembler had no room for.
- ``shared``: bytes of shared memory of a program of the grid.

JAX's own kernel is compiled with JAX 0.10, and added to what is there with ``--formats --peer --add``.
"""

import argparse
import json
import os
import re
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding
from record import circumstances, save

import qpaged

DUMP = tempfile.TemporaryDirectory()  # of what Mosaic GPU tells of its kernels
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
FORMATS = "plain", "int8", "int8:token", "fp8_e4m3", "int4:token"
Q_HEADS, KV_HEADS, HEAD_DIM, PAGE_SIZE = 32, 8, 128, 16
SHAPES = {"8 x 4k": (8, 256), "64 x 8k": (64, 512), "1 x 128k": (1, 8192)}  # sequences, pages of each
POOL = 1024  # pages of the first shape; the others hold what their sequences take


def compiled(function: Any, gpu: Any, *arguments: Any) -> dict[str, Any]:
    """The memory of ``function``, compiled for the GPU; why not, where JAX refuses."""
    placed = jax.tree_util.tree_map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=gpu), arguments)
    try:
        memory = jax.jit(function).lower(*placed).compile().memory_analysis()
    except (ImportError, RuntimeError, NotImplementedError, ValueError) as error:
        return {"refused": str(error)[:200]}
    return {
        "temp": memory.temp_size_in_bytes, "arguments": memory.argument_size_in_bytes, **resources(),
    }  # fmt: skip


def resources() -> dict[str, int]:
    """What the assembler said of the kernel that was compiled last."""
    told = ""
    for path in Path(DUMP.name).iterdir():
        if path.suffix == ".ptxas" or path.name.endswith(".resources.txt"):
            told += path.read_text()
        path.unlink()
    said = {
        "registers": r"Used (\d+) registers",
        "spilled": r"(\d+) bytes spill stores",
        "shared": r"smem_scratch_bytes=(\d+)",
    }
    found = {name: re.search(pattern, told) for name, pattern in said.items()}
    return {name: int(match.group(1)) for name, match in found.items() if match}


def array(*shape: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def pool_pages(shape: str) -> int:
    sequences, pages = SHAPES[shape]
    return POOL if shape == next(iter(SHAPES)) else sequences * pages


def view_of(format: str, shape: str) -> qpaged.PagedAttentionCacheView:
    sequences, pages = SHAPES[shape]
    config = qpaged.PagedAttentionCacheMetaData(
        sequences, 1, pool_pages(shape), pages, pages * PAGE_SIZE, PAGE_SIZE, KV_HEADS, HEAD_DIM, 0.5
    )
    fresh = qpaged.PagedAttentionCacheView.fresh
    return jax.eval_shape(lambda: fresh(None, jnp.bfloat16, config, 0, None, format))


def attend(query, view, position, table):
    metadata = qpaged.PagedAttentionMetadata.decode(position=position, page_table=table)
    return qpaged.paged_attention(query, view, metadata, backend="gpu")


def ours(gpu: Any, format: str, shape: str) -> dict[str, Any]:
    sequences, pages = SHAPES[shape]
    query = array(sequences, Q_HEADS, HEAD_DIM, dtype=jnp.bfloat16)
    return compiled(attend, gpu, query, view_of(format, shape), array(sequences), array(sequences, pages))


def peer(gpu: Any, format: str, shape: str) -> dict[str, Any]:
    """JAX's own Pallas-Triton kernel, on its own pools."""
    from jax.experimental.pallas.ops.gpu.paged_attention import paged_attention

    def decode(query, keys, values, table, lengths, *scales):
        named = dict(zip(("k_scales_pages", "v_scales_pages"), scales, strict=False))
        return paged_attention(query, keys, values, table, lengths, **named)

    sequences, pages = SHAPES[shape]
    slots = KV_HEADS, pool_pages(shape), PAGE_SIZE
    pool = array(*slots, HEAD_DIM, dtype=jnp.dtype(format))
    scales = [array(*slots, dtype=jnp.float32)] * 2 if format == "int8" else []
    query = array(sequences, Q_HEADS, HEAD_DIM, dtype=jnp.bfloat16)
    return compiled(decode, gpu, query, pool, pool, array(sequences, pages), array(sequences), *scales)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="write the results here as JSON")
    parser.add_argument("--formats", nargs="*", default=list(FORMATS))
    parser.add_argument("--peer", action="store_true", help="JAX's own kernel too; JAX 0.10 compiles it")
    parser.add_argument("--add", action="store_true", help="keep the runs that are already in --out")
    arguments = parser.parse_args()
    devices = topologies.get_topology_desc(
        topology_name="", platform="cuda", topology="1x1x1", target_config=H200
    ).devices
    gpu = SingleDeviceSharding(devices[0])
    runs = []
    for shape in SHAPES:
        for format in arguments.formats:
            runs.append({"shape": shape, "kernel": "qpaged", "format": format, **ours(gpu, format, shape)})
            print(json.dumps(runs[-1]), flush=True)
        for format in ("bfloat16", "int8") if arguments.peer else ():
            runs.append({"shape": shape, "kernel": "jax", "format": format, **peer(gpu, format, shape)})
            runs[-1]["jax"] = jax.__version__
            print(json.dumps(runs[-1]), flush=True)
    if arguments.add:
        saved = json.loads(arguments.out.read_text())
        save(arguments.out, saved | {"runs": saved["runs"] + runs})
        return
    made = circumstances(["jax-cuda13-plugin", "nvidia-cuda-nvcc"]) | {"device": f"{NAME}, described"}
    save(arguments.out, {**made, "unmeasured": "compiled without a GPU: no times", "runs": runs})


if __name__ == "__main__":
    main()
