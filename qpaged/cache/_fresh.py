"""Fresh pools: how one is made, of how many bytes, and on which devices."""

import functools
import inspect
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from qpaged import arrays, pools
from qpaged._arguments import shown
from qpaged._compat import spec_axes
from qpaged._eager import any_traced
from qpaged.cache._placement import Placement
from qpaged.cache._sharding import EMPTY, KV_HEAD, MODE, PartitionManager, Resolver, leaf_spec
from qpaged.formats import ExactFormat, PoolQuantizer, Quantizer, get_quantizer
from qpaged.pools import ExactPages, Pages

REPLICATED = PartitionSpec()
SLOT_AXES = 1, 2  # of a pool: a token names a page and a slot of it


class Sequences(NamedTuple):
    """The sequences of a cache: how many are decoded at once, and the pages of the longest."""

    number: int
    pages: int


MakePages: TypeAlias = Callable[[jax.Array], Any]
"""A function that turns a pool's zeros into its pages."""
PoolFormat: TypeAlias = PoolQuantizer | MakePages | None
"""The format of one pool; None for plain arrays."""


def fresh_pages(
    quantizer: PoolFormat,
    shape: Sequence[int],
    dtype: DTypeLike,
    sequences: Sequences,
    spec: PartitionSpec = REPLICATED,
) -> Pages:
    """Return a pool (kv_heads, pages, page_size, head_dim) that reads as exact zeros; traceable.

    Exact pages, if the format has them, are those of ``sequences``.
    """
    if isinstance(quantizer, ExactFormat):
        pages: Pages = _with_exact_pages(quantizer, shape, dtype, sequences)
    elif quantizer is None:
        pages = jnp.zeros(shape, dtype)
    elif isinstance(quantizer, Quantizer):
        pages = quantizer.empty(shape, dtype)
        if not arrays.takes_rows(pages, SLOT_AXES):
            raise ValueError(
                f"quantizer must take tokens one by one, but scales of {quantizer} are shared by several "
                f"and do not grow; keep the page that is not yet full exact: {quantizer}+exact1."
            )
    else:
        pages = quantizer(jnp.zeros(shape, dtype))
        if len(getattr(pages, "shape", ())) != len(shape):
            raise TypeError(
                f"quantizer must be a function that makes pages (kv_heads, pages, page_size, head_dim) of a "
                f"pool's zeros, but {shown(quantizer)} made {shown(pages)}; return an array of four axes."
            )
    slots_or_channels_are_partitioned = any(spec[2:])
    if slots_or_channels_are_partitioned:  # which rows of several slots would not survive
        return pages
    return pools.fill_lane_rows(pages)


def _with_exact_pages(
    quantizer: ExactFormat, shape: Sequence[int], dtype: DTypeLike, sequences: Sequences
) -> ExactPages:
    kv_heads, _, page_size, head_dim = shape
    window = min(quantizer.window(page_size), sequences.pages)
    sinks = min(quantizer.sink_pages(page_size), sequences.pages - window)
    capacity = sequences.number * (window + sinks)
    rows = get_quantizer("raw").empty((kv_heads, capacity, page_size, head_dim), dtype)
    return ExactPages.fresh(quantizer.inner.empty(shape, dtype), rows, window, sinks)


def check_takes_zeros(make_pages: MakePages) -> None:
    """Raise TypeError unless a function takes one argument."""
    try:
        signature = inspect.signature(make_pages)
    except ValueError:  # some of those written in C tell nothing
        return
    try:
        signature.bind("zeros")
    except TypeError as error:
        raise TypeError(
            f"quantizer must be a function of one argument, a pool's zeros, but {shown(make_pages)} takes "
            f"{signature}; give such a function, or the spelling of a format."
        ) from error


def allocate_pages(
    quantizer: PoolFormat,
    shape: Sequence[int],
    dtype: DTypeLike,
    sequences: Sequences,
    mesh: Mesh | None,
    manager: Resolver | None,
) -> Pages:
    """Return a fresh pool on the mesh's devices, or on the default device where there is no mesh."""
    shape = tuple(shape)
    placement = Placement.of(mesh, manager, shape)
    if placement is not None and mesh is not None:
        return _allocate_over_devices(
            placement, mesh, (quantizer, _local(placement, shape), dtype, sequences)
        )
    spec = pages_spec(shape, mesh, manager)
    shardings = None
    if mesh is not None:
        shardings = pages_shardings(quantizer, shape, dtype, sequences, mesh, spec)
    # Static arguments of one function: the pools of all layers share a compilation.
    fresh = jax.jit(fresh_pages, static_argnums=(0, 1, 2, 3, 4), out_shardings=shardings)
    return fresh(quantizer, shape, dtype, sequences, spec)


def _local(placement: Placement, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of what one device holds of a pool whose pages are those of a group."""
    kv_heads, pages, *slot = shape
    stored = placement.stored_heads(kv_heads)
    return stored // placement.num_head_shards, placement.local_pages(pages), *slot


def _allocate_over_devices(
    placement: Placement,
    mesh: Mesh,
    local: tuple[PoolFormat, tuple[int, ...], DTypeLike, Sequences],
) -> Pages:
    """Return a fresh pool, each device's part of which is made there."""
    quantizer, (kv_heads, pages, *slot), dtype, sequences = local
    if placement.context and isinstance(quantizer, ExactFormat):
        raise ValueError(
            f"quantizer must be one without exact pages where devices share the pages of a sequence, but is "
            f"{quantizer}; leave out +exact and +sink."
        )
    parts = placement.num_groups * placement.context_size
    whole = (kv_heads * placement.num_head_shards, pages * parts, *slot)
    of_all = Sequences(sequences.number * placement.num_groups, sequences.pages)
    leaves, tree = jax.tree_util.tree_flatten(
        jax.eval_shape(lambda: fresh_pages(quantizer, whole, dtype, of_all))
    )
    made = _fresh_leaves(mesh, tuple(placement.pool_specs(leaves)), *local)
    return jax.tree_util.tree_unflatten(tree, made)


@functools.partial(jax.jit, static_argnums=range(6))
def _fresh_leaves(
    mesh: Mesh,
    specs: tuple[PartitionSpec, ...],
    quantizer: PoolFormat,
    shape: tuple[int, ...],
    dtype: DTypeLike,
    sequences: Sequences,
) -> tuple[jax.Array, ...]:
    """Return the arrays of a pool, each device's part of which has ``shape``."""

    def fresh() -> tuple[jax.Array, ...]:
        return tuple(jax.tree_util.tree_leaves(fresh_pages(quantizer, shape, dtype, sequences)))

    return jax.shard_map(fresh, mesh=mesh, in_specs=(), out_specs=specs, check_vma=False)()


def pages_spec(shape: Sequence[int], mesh: Mesh | None, manager: Resolver | None) -> PartitionSpec:
    """Return the partition of a pool's codes, as the manager resolves it."""
    if mesh is None:
        return REPLICATED
    manager = PartitionManager(mesh) if manager is None else manager
    spec = manager.resolve([KV_HEAD, EMPTY, EMPTY, EMPTY], mode=MODE, shape=tuple(shape))
    check_divides(spec, shape, mesh)
    return spec


def pages_shardings(
    quantizer: PoolFormat,
    shape: Sequence[int],
    dtype: DTypeLike,
    sequences: Sequences,
    mesh: Mesh,
    spec: PartitionSpec,
) -> Any:
    """Return the sharding of every leaf: the codes' partition, as far as the leaf's axes divide.

    Lists of pages are on every device.
    """
    leaves = jax.eval_shape(lambda: fresh_pages(quantizer, shape, dtype, sequences, spec))

    def sharding(leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        of_leaf = leaf_spec(spec, leaf.shape, mesh) if leaf.ndim == len(shape) else REPLICATED
        return NamedSharding(mesh, of_leaf)

    return jax.tree_util.tree_map(sharding, leaves)


def check_divides(spec: PartitionSpec, shape: Sequence[int], mesh: Mesh) -> None:
    """Raise ValueError unless the mesh divides ``shape`` as ``spec`` says."""
    if tuple(leaf_spec(spec, shape, mesh)) != tuple(spec):
        raise ValueError(
            f"partition_manager must divide a pool of shape {tuple(shape)} evenly over the mesh "
            f"{dict(mesh.shape)}, but resolved it to {spec}; leave the axes that do not divide unpartitioned."
        )


def round_to_shards(
    pages: int,
    shape: Sequence[int],  # (kv_heads, page_size, head_dim)
    mesh: Mesh | None,
    manager: Resolver | None,
) -> int:
    """Return the largest number of pages, up to ``pages``, that the mesh divides evenly."""
    if mesh is None or manager is None:
        return pages
    kv_heads, page_size, head_dim = shape
    # A manager may look at the shape: this number of pages divides over any axes of the mesh.
    pool = (kv_heads, pages - pages % mesh.size, page_size, head_dim)
    spec = manager.resolve([KV_HEAD, EMPTY, EMPTY, EMPTY], mode=MODE, shape=pool)
    axes = spec_axes(spec[1]) if len(spec) > 1 else ()
    shards = int(np.prod([mesh.shape[axis] for axis in axes if axis in mesh.shape]))
    return pages - pages % shards


def device_bytes(
    quantizer: PoolFormat,
    shape: Sequence[int],
    dtype: DTypeLike,
    sequences: Sequences,
    mesh: Mesh | None,
    manager: Resolver | None,
) -> int:
    """Return the bytes of a pool on one device, scales included: what the format's own arrays take there."""
    placement = Placement.of(mesh, manager, shape)
    if placement is not None:
        kv_heads, pages, *slot = shape
        local = _local(placement, (kv_heads, pages * placement.context_size, *slot))
        return pools.bytes_of(jax.eval_shape(lambda: fresh_pages(quantizer, local, dtype, sequences)))
    spec = pages_spec(shape, mesh, manager)
    pool = jax.eval_shape(lambda: fresh_pages(quantizer, tuple(shape), dtype, sequences, spec))
    leaves = jax.tree_util.tree_leaves(pool)
    shapes = [leaf.shape for leaf in leaves]
    if mesh is not None:
        shardings = jax.tree_util.tree_leaves(pages_shardings(quantizer, shape, dtype, sequences, mesh, spec))
        shapes = [sharding.shard_shape(shape) for sharding, shape in zip(shardings, shapes, strict=True)]
    return sum(int(np.prod(shape)) * leaf.dtype.itemsize for shape, leaf in zip(shapes, leaves, strict=True))


class NarrowFloatPoolWarning(UserWarning):
    """A plain 16- or 8-bit float pool on CPU, where every write and read costs the whole pool."""


def warn_of_narrow_floats(*all_pages: Pages) -> None:
    """Warn, once, of plain pools that XLA on CPU copies whole at every write and read."""
    for pages in all_pages:
        if not pools.is_narrow_float(pages) or any_traced(pages):
            continue
        device = next(iter(jax.tree_util.tree_leaves(pages)[0].devices()))
        if device.platform == "cpu":
            warnings.warn(
                f"XLA on CPU copies a whole {pages.dtype.name} pool at every write and read; "
                f"quantizer='raw' stores the same bits as integers and does not.",
                NarrowFloatPoolWarning,
                stacklevel=3,
            )
            return
