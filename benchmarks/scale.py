"""Compiles a decode step of a 70B model for pods of TPUs without a TPU, and records what the compiler made.

    python benchmarks/scale.py --out benchmarks/results/scale.json

The step has Llama 3 70B's sizes: 80 layers, 64 query heads over 8 KV heads of 128. Each layer is projections,
a write to int8 pages by token, attention, and a gated MLP; weights are divided over ``tp`` and pages and
sequences over ``dp``. ``jit`` is that step as one writes it, with no word of meshes, in a scan over the
layers of a flat cache. ``shard_map`` is the same step divided by hand: each device calls qpaged on what it
holds. ``cache alone`` is the scan of ``jit`` without weights: what they take, which the compiler may lay out
anew, is not in its temporaries.

- ``temp``: bytes of temporaries in HBM on one chip; ``pools`` those of the cache there, and ``planned`` what
  ``qpaged.plan`` counts for it.
- ``kernels``: calls of kernels in a layer; ``collectives``: in a layer, by kind, with the largest operand.

Needs libtpu.
"""

import argparse
import collections
import json
import os
import re
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.experimental.layout import Format, Layout
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from record import circumstances, save

import qpaged

PODS = {"v5e:16x16": (16, 16), "v5p:8x8x8": (64, 8), "v6e:8x8": (8, 8), "tpu7x:4x4x4": (16, 8)}
"""Groups and devices of a group. A v5e has room for a sixteenth of the weights; KV heads are stored twice."""
LAYERS, HIDDEN, FFN, Q_HEADS, KV_HEADS, HEAD_DIM = 80, 8192, 28672, 64, 8, 128
PAGE_SIZE, TOKENS, PAGES, SEQUENCES = 16, 8192, 2048, 4  # pages of a layer and sequences, of each group
FORMAT = "int8:token"
COLLECTIVE = re.compile(
    r"= (\S+) (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\("
)
WEIGHTS = {
    "q": ((HIDDEN, Q_HEADS * HEAD_DIM), (None, "tp")),
    "k": ((HIDDEN, KV_HEADS * HEAD_DIM), (None, "tp")),
    "v": ((HIDDEN, KV_HEADS * HEAD_DIM), (None, "tp")),
    "o": ((Q_HEADS * HEAD_DIM, HIDDEN), ("tp", None)),
    "gate": ((HIDDEN, FFN), (None, "tp")),
    "up": ((HIDDEN, FFN), (None, "tp")),
    "down": ((FFN, HIDDEN), ("tp", None)),
}


def pod_mesh(name: str, style: str) -> Mesh:
    """Return the mesh of a pod that is not there."""
    groups, shards = PODS[name]
    if style == "cache alone":
        groups, shards = groups * shards // KV_HEADS, KV_HEADS
    devices = topologies.get_topology_desc(platform="tpu", topology_name=name).devices
    grid = np.array(devices[: groups * shards]).reshape(groups, shards)
    return Mesh(grid, ("dp", "tp"), axis_types=(AxisType.Auto,) * 2)


def abstract_cache(mesh: Mesh) -> qpaged.PagedAttentionCache:
    """Return a flat cache without allocating it, placed as it would be."""
    config = qpaged.PagedAttentionCacheMetaData(
        SEQUENCES, LAYERS, PAGES, TOKENS // PAGE_SIZE, TOKENS, PAGE_SIZE, KV_HEADS, HEAD_DIM, 0.5
    )
    cache = jax.eval_shape(
        lambda: qpaged.PagedAttentionCache.init_cache(
            mesh.abstract_mesh, jnp.bfloat16, config, quantizer=FORMAT, flat=True
        )
    )
    return jax.tree_util.tree_map(lambda leaf: placed(mesh, leaf, P("tp", "dp")), cache)


def placed(mesh: Mesh, leaf: Any, spec: P) -> jax.ShapeDtypeStruct:
    """Return an abstract array, laid out so."""
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))


def weight_spec(mesh: Mesh, weight: str) -> P:
    """Return how the weights of all layers are divided: whole, where there are more devices than KV heads."""
    if weight in ("k", "v") and KV_HEADS % mesh.shape["tp"]:
        return P()
    return P(None, *WEIGHTS[weight][1])


def norm(x: jax.Array) -> jax.Array:
    x32 = x.astype(jnp.float32)
    return (x32 * jax.lax.rsqrt(jnp.mean(x32**2, axis=-1, keepdims=True) + 1e-6)).astype(x.dtype)


def block(carry: Any, layer_and_weights: Any, step: qpaged.PagedAttentionMetadata, sum_over_tp: Any) -> Any:
    """Return the carry after a layer; ``sum_over_tp`` adds up what the devices of a group have."""
    cache, x = carry  # x: [sequences, hidden]
    layer, weights = layer_and_weights
    attended = norm(x)
    query, key, value = ((attended @ weights[name]).reshape(len(x), -1, HEAD_DIM) for name in ("q", "k", "v"))
    view = cache.layer(layer).write_to_cache(key, value, step)
    out = qpaged.paged_attention(query, view, step)
    x = x + sum_over_tp(out.reshape(len(x), -1) @ weights["o"])
    hidden = norm(x)
    gated = jax.nn.silu(hidden @ weights["gate"]) * (hidden @ weights["up"])
    return (cache.with_layer(view), x + sum_over_tp(gated @ weights["down"])), None


def cache_alone(cache: Any, x: jax.Array, step: Any) -> Any:
    """Scan over the layers of the cache: a write and attention in each."""

    def block(carry: Any, layer: jax.Array) -> Any:
        cache, x = carry
        query = x.reshape(len(x), Q_HEADS, HEAD_DIM)
        key = query.reshape(len(x), KV_HEADS, -1, HEAD_DIM).mean(axis=2)
        view = cache.layer(layer).write_to_cache(key, key, step)
        return (cache.with_layer(view), qpaged.paged_attention(query, view, step).reshape(x.shape)), None

    (cache, x), _ = jax.lax.scan(block, (cache, x), jnp.arange(LAYERS))
    return cache, x


def in_jit(cache: Any, x: jax.Array, weights: Any, step: Any) -> Any:
    """Scan over the layers, as one writes it for one device."""
    body = partial(block, step=step, sum_over_tp=lambda part: part)
    (cache, x), _ = jax.lax.scan(body, (cache, x), (jnp.arange(LAYERS), weights))
    return cache, x


def by_hand(mesh: Mesh, cache: Any, x: jax.Array, weights: Any, step: Any) -> Any:
    """Do the same, divided by hand."""

    def local(cache: Any, x: jax.Array, weights: Any, step: Any) -> Any:
        body = partial(block, step=step, sum_over_tp=lambda part: jax.lax.psum(part, "tp"))
        (cache, x), _ = jax.lax.scan(body, (cache, x), (jnp.arange(LAYERS), weights))
        return cache, x

    of_cache = jax.tree_util.tree_map(lambda leaf: P("tp", "dp"), cache)
    of_step = jax.tree_util.tree_map(lambda leaf: P("dp") if leaf.ndim else P(), step)
    of_weights = {name: P(None, *spec) for name, (_, spec) in WEIGHTS.items()}
    copies = mesh.shape["tp"] // KV_HEADS
    if copies > 1:  # a device has one head, which others have, too
        for name in ("k", "v"):
            heads = weights[name].reshape(LAYERS, HIDDEN, KV_HEADS, HEAD_DIM)
            weights = {**weights, name: jnp.repeat(heads, copies, 2).reshape(LAYERS, HIDDEN, -1)}
    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(of_cache, P("dp"), of_weights, of_step),
        out_specs=(of_cache, P("dp")),
    )(cache, x, weights, step)


def measure(name: str, style: str) -> dict[str, Any]:
    """Compile the step for a pod, and return what the compiler says of it."""
    mesh = pod_mesh(name, style)
    groups = mesh.shape["dp"]
    batch = groups * SEQUENCES
    cache = abstract_cache(mesh)
    weights = {
        weight: placed(mesh, jax.ShapeDtypeStruct((LAYERS, *shape), jnp.bfloat16), weight_spec(mesh, weight))
        for weight, (shape, _) in WEIGHTS.items()
    }
    step = jax.eval_shape(
        lambda position, table: qpaged.PagedAttentionMetadata.decode(position=position, page_table=table),
        jax.ShapeDtypeStruct((batch,), jnp.int32),
        jax.ShapeDtypeStruct((batch, TOKENS // PAGE_SIZE), jnp.int32),
    )
    step = jax.tree_util.tree_map(lambda leaf: placed(mesh, leaf, P("dp") if leaf.ndim else P()), step)
    x = placed(mesh, jax.ShapeDtypeStruct((batch, HIDDEN), jnp.bfloat16), P("dp"))
    function = in_jit if style == "jit" else partial(by_hand, mesh)
    if style == "cache alone":
        x = placed(mesh, x, P("dp", "tp"))
        compiled = jax.jit(cache_alone, donate_argnums=0).lower(cache, x, step).compile()
        return {"pod": name, "style": style, "devices": mesh.size, **described(compiled, cache)}
    # The compiler lays weights out as it likes; else it would do so at every step.
    of_weights = jax.tree_util.tree_map(lambda leaf: Format(Layout.AUTO, leaf.sharding), weights)
    weights = jax.tree_util.tree_map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), weights)
    others = jax.tree_util.tree_map(lambda leaf: leaf.sharding, (cache, x, step))
    in_shardings = (*others[:2], of_weights, others[2])
    jitted = jax.jit(function, donate_argnums=0, in_shardings=in_shardings)
    compiled = jitted.lower(cache, x, weights, step).compile()
    return {"pod": name, "style": style, "devices": mesh.size, **described(compiled, cache)}


def described(compiled: Any, cache: qpaged.PagedAttentionCache) -> dict[str, Any]:
    """Return what the compiler says of a program, and the bytes of a chip's part of the cache."""
    memory, text = compiled.memory_analysis(), compiled.as_text()
    collectives: dict[str, int] = collections.Counter()
    largest = 0
    for shape, kind in COLLECTIVE.findall(text):
        collectives[kind] += 1
        for dims in re.findall(r"\[([\d,]+)\]", shape):
            largest = max(largest, int(np.prod([int(size) for size in dims.split(",")])))
    leaves = jax.tree_util.tree_leaves(cache)
    pools = sum(int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize for leaf in leaves)
    return {
        "temp": memory.temp_size_in_bytes,
        "arguments": memory.argument_size_in_bytes,
        "aliased": memory.alias_size_in_bytes,
        "pools": pools,
        "kernels": text.count('custom_call_target="tpu_custom_call"'),
        "collectives": dict(collectives),
        "largest_collective_elements": largest,
    }


def planned_bytes() -> int:
    """Return the bytes of a chip's part of the cache, as ``qpaged.plan`` counts them."""
    sizes = qpaged.models.CacheSizes(
        num_hidden_layers=LAYERS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        max_position_embeddings=TOKENS,
    )
    plan = qpaged.plan.plan(
        sizes, FORMAT, memory_bytes=2**34, context=TOKENS, page_size=PAGE_SIZE, mesh_size=8
    )
    return round(plan.cache / plan.pages * PAGES)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="write the results here as JSON")
    parser.add_argument("--pods", nargs="+", choices=PODS, default=list(PODS))
    arguments = parser.parse_args()
    runs = []
    for name in arguments.pods:
        for style in ("jit", "shard_map", "cache alone"):
            runs.append(measure(name, style))
            print(json.dumps(runs[-1]), flush=True)
    shape = {
        "layers": LAYERS, "q_heads": Q_HEADS, "kv_heads": KV_HEADS, "head_dim": HEAD_DIM, "format": FORMAT,
        "page_size": PAGE_SIZE, "pages": PAGES, "sequences": SEQUENCES, "tokens": TOKENS,
    }  # fmt: skip
    save(
        arguments.out, {**circumstances(["libtpu"]), "shape": shape, "planned": planned_bytes(), "runs": runs}
    )


if __name__ == "__main__":
    main()
