"""Pools of pages: how one is made, of how many bytes, and on which devices."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from qpaged.arrays import QuantizedArray, fill_rows
from qpaged.cache._sharding import EMPTY, KV_HEAD, MODE, PartitionManager, leaf_spec
from qpaged.quantizer import Quantizer

WHOLE = PartitionSpec()

PagesFormat = Quantizer | Callable[[jax.Array], Any] | None


def fresh_pages(format: PagesFormat, shape: Sequence[int], dtype: Any, spec: PartitionSpec = WHOLE) -> Any:
    """A pool (kv_heads, pages, page_size, head_dim) that reads as exact zeros; traceable.

    A callable takes the pool's zeros and returns its pages. Codes fill a TPU's rows, unless the pool is
    partitioned along slots or channels.
    """
    if format is None:
        return jnp.zeros(shape, dtype)
    pages = format.empty(shape, dtype) if isinstance(format, Quantizer) else format(jnp.zeros(shape, dtype))
    return fill_rows(pages) if isinstance(pages, QuantizedArray) and not any(spec[2:]) else pages


def allocate_pages(
    format: PagesFormat, shape: Sequence[int], dtype: Any, mesh: Mesh | None, manager: Any
) -> Any:
    """A fresh pool on the mesh's devices, or on the default device where there is no mesh."""
    shape = tuple(shape)
    spec = pages_spec(shape, mesh, manager)
    shardings = None if mesh is None else pages_shardings(format, shape, dtype, mesh, spec)
    # Static arguments of one function: the pools of all layers share a compilation.
    fresh = jax.jit(fresh_pages, static_argnums=(0, 1, 2, 3), out_shardings=shardings)
    return fresh(format, shape, dtype, spec)


def pages_spec(shape: Sequence[int], mesh: Mesh | None, manager: Any) -> PartitionSpec:
    """The partition of a pool's codes, as the manager resolves it."""
    if mesh is None:
        return WHOLE
    manager = PartitionManager(mesh) if manager is None else manager
    spec = manager.resolve([KV_HEAD, EMPTY, EMPTY, EMPTY], mode=MODE, shape=tuple(shape))
    check_divides(spec, shape, mesh)
    return spec


def pages_shardings(
    format: PagesFormat, shape: Sequence[int], dtype: Any, mesh: Mesh, spec: PartitionSpec
) -> Any:
    """The sharding of every leaf: the codes' partition, where a leaf's own axes are long enough for it."""
    leaves = jax.eval_shape(lambda: fresh_pages(format, shape, dtype, spec))
    return jax.tree_util.tree_map(lambda leaf: NamedSharding(mesh, leaf_spec(spec, leaf.shape, mesh)), leaves)


def check_divides(spec: PartitionSpec, shape: Sequence[int], mesh: Mesh) -> None:
    if tuple(leaf_spec(spec, shape, mesh)) != tuple(spec):
        raise ValueError(
            f"partition_manager must divide a pool of shape {tuple(shape)} evenly over the mesh "
            f"{dict(mesh.shape)}, but resolved it to {spec}; leave the axes that do not divide unpartitioned."
        )


def whole_shards(pages: int, shape: Sequence[int], mesh: Mesh | None, manager: Any) -> int:
    """``pages``, or as many fewer as make them a number that the mesh divides as it divides any.

    Args:
        shape: (kv_heads, page_size, head_dim).
    """
    if mesh is None or manager is None:
        return pages
    kv_heads, page_size, head_dim = shape
    pool = (kv_heads, pages - pages % mesh.size, page_size, head_dim)
    spec = manager.resolve([KV_HEAD, EMPTY, EMPTY, EMPTY], mode=MODE, shape=pool)
    names = spec[1] if len(spec) > 1 and spec[1] is not None else ()
    names = names if isinstance(names, tuple) else (names,)
    return pages - pages % int(np.prod([mesh.shape[name] for name in names if name in mesh.shape]))


def device_bytes(
    format: PagesFormat, shape: Sequence[int], dtype: Any, mesh: Mesh | None, manager: Any
) -> int:
    """Bytes of a pool on one device, scales included: what the format's own arrays take there."""
    spec = pages_spec(shape, mesh, manager)
    leaves = jax.tree_util.tree_leaves(jax.eval_shape(lambda: fresh_pages(format, tuple(shape), dtype, spec)))
    shapes = [leaf.shape for leaf in leaves]
    if mesh is not None:
        shardings = jax.tree_util.tree_leaves(pages_shardings(format, shape, dtype, mesh, spec))
        shapes = [sharding.shard_shape(shape) for sharding, shape in zip(shardings, shapes, strict=True)]
    return sum(int(np.prod(s)) * leaf.dtype.itemsize for s, leaf in zip(shapes, leaves, strict=True))


class NarrowFloatPoolWarning(UserWarning):
    """A plain 16- or 8-bit float pool on CPU, where every write and read costs the whole pool."""


def warn_of_narrow_floats(*pools: Any) -> None:
    """Warn of plain pools that XLA on CPU widens whole at every write and read."""
    for pool in pools:
        narrow = (
            isinstance(pool, jax.Array) and jnp.issubdtype(pool.dtype, jnp.floating) and pool.itemsize < 4
        )
        if narrow and not isinstance(pool, jax.core.Tracer) and next(iter(pool.devices())).platform == "cpu":
            warnings.warn(
                f"XLA on CPU copies a whole {pool.dtype.name} pool at every write and read; "
                f"quantizer='raw' stores the same bits as integers and does not.",
                NarrowFloatPoolWarning,
                stacklevel=3,
            )
            return
