"""The functions of :mod:`qpaged.pools`, and the one place that decides of what kind a pool is."""

from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding

from qpaged._compat import explicit_sharding
from qpaged._eager import compiled_if_eager
from qpaged.arrays import ArrayFormat, QuantizedArray
from qpaged.arrays._quantized import short
from qpaged.formats import ExactFormat
from qpaged.implicit import ImplicitArray
from qpaged.pools import _exact, _in_keys, _quantized
from qpaged.pools._implicit import ImplicitPool
from qpaged.pools._plain import PlainPool
from qpaged.pools._pool import Pages, Pool, PoolBytes, SlotMapping, Slots
from qpaged.pools._quantized import QuantizedPool


def _pool_of(pages: Pages) -> Pool:
    """Return the interface to the pages of a cache: the kind of pool that they are."""
    if isinstance(pages, Pool):
        return pages
    if isinstance(pages, QuantizedArray):
        return QuantizedPool(pages)
    if isinstance(pages, ImplicitArray):
        return ImplicitPool(pages)
    return PlainPool(pages)


@compiled_if_eager()
def write_slots(
    pages: Pages,
    slot_mapping: SlotMapping | tuple[jax.Array, jax.Array],  # (page, slot), [tokens] each
    rows: jax.Array,  # [tokens, kv_heads, head_dim]
) -> Pages:
    """Return a pool with ``rows`` written at (page, slot); rows out of range are dropped."""
    return _pool_of(pages).write_slots(SlotMapping(*slot_mapping), rows)


@compiled_if_eager()
def write_both(
    pages: Pages,
    slot_mapping: SlotMapping,
    keys: jax.Array,  # [tokens, kv_heads, head_dim]
    values: jax.Array | None,  # [tokens, kv_heads, head_dim], if they are no part of the keys
) -> Pages:
    """Return a pool of keys, within which values lie too, with both written at (page, slot)."""
    return _pool_of(pages).write_both(slot_mapping, keys, values)


def values_within(pages: Pages) -> Pages:
    """Return the pool that attention reads as values, where they lie within these pages of keys."""
    return pages.values_within() if isinstance(pages, Pool) else pages


def gather_slots(
    pages: Pages,
    indices: jax.Array,  # [n]
) -> Slots:
    """Return the slots (kv_heads, n * page_size, head_dim) of these pages; zeros where out of range."""
    return _pool_of(pages).gather_slots(indices)


def clear_pages(
    pages: Pages,
    indices: jax.Array,  # [n]
) -> Pages:
    """Return a pool with the pages at ``indices`` as before any write, in O(n); out of range is dropped."""
    return _pool_of(pages).clear_pages(indices)


def copy_pages(
    pages: Pages,
    source: jax.Array,  # [n]
    target: jax.Array,  # [n]
) -> Pages:
    """Return a pool with pages ``source`` copied to ``target``, codes and scales bit for bit, in O(n).

    All sources are read before any target is written. A pair with a page out of range is dropped; of several
    pairs with one target the last counts.
    """
    return _pool_of(pages).copy_pages(source, target)


def take_pages(
    pages: Pages,
    indices: jax.Array,  # [n]
    sequences: int,
) -> Pages:
    """Return the pages at ``indices`` as a pool of n pages, bit for bit; any where out of range.

    Exact pages are packed if they are more than those of so many sequences.
    """
    return _pool_of(pages).take_pages(indices, sequences)


def put_pages(
    pages: Pages,
    taken: Pages,
    target: jax.Array,  # [n]
) -> Pages:
    """Return a pool with the pages of :func:`take_pages` at ``target``; out of range is dropped.

    Of several pages with one target the last counts.
    """
    return _pool_of(pages).put_pages(taken, target)


def is_exact(pages: Pages, indices: jax.Array) -> jax.Array | None:
    """Return True where page indices of any shape are of exact pages; None for pools that have none."""
    return _pool_of(pages).is_exact(indices)


def has_exact_pages(*all_pages: Pages) -> bool:
    """Return True if any of the pools keeps exact pages beside its codes."""
    return any(_pool_of(pages).has_exact_pages for pages in all_pages)


def packed(pages: Pages) -> Pages:
    """Return the pool that attention reads where pages are not exact: of most kinds, itself."""
    return _pool_of(pages).packed() if isinstance(pages, Pool) else pages


def with_packed(pages: Pages, packed_pages: Pages) -> Pages:
    """Return a pool with others in the place of those that :func:`packed` returns."""
    return _pool_of(pages).with_packed(packed_pages)


def pack_pages(
    pages: Pages,
    indices: jax.Array,  # [n]
    lengths: jax.Array,  # [n]
) -> Pages:
    """Return a pool with exact pages at ``indices`` packed; slots from ``lengths`` on are zeros then."""
    return _pool_of(pages).pack_pages(indices, lengths) if isinstance(pages, Pool) else pages


def kind_of(pages: Pages) -> type[Pool]:
    """Return the kind of a pool."""
    return type(_pool_of(pages))


def count_bytes(pages: Pages) -> PoolBytes:
    """Return the bytes of a pool, whose leaves may be ShapeDtypeStructs."""
    return _pool_of(pages).count_bytes()


def fill_lane_rows(pages: Pages) -> Pages:
    """Return a pool, to which nothing was written yet, in rows that fill a TPU's lanes, if its kind can."""
    return _pool_of(pages).fill_lane_rows()


def as_quantized(pages: Pages) -> QuantizedArray | None:
    """Return the quantized array that a pool is, for kernels that read codes; None if it is none."""
    return _pool_of(pages).as_quantized()


def format_of(pages: Pages) -> ArrayFormat | ExactFormat | None:
    """Return the format of a quantized pool, with exact pages or without; None of any other."""
    made_with: ArrayFormat | ExactFormat | None = _pool_of(pages).format
    return made_with


def packed_format(pages: Pages) -> ArrayFormat | None:
    """Return the format of a quantized pool; of one with exact pages, that of the others."""
    made_with = format_of(pages)
    return made_with.inner if isinstance(made_with, ExactFormat) else made_with


def static_scales(pages: Pages) -> jax.Array | None:
    """Return the given scales (kv_heads or 1, 1, 1, 1) that all the pages of a pool share; None without."""
    return _pool_of(pages).static_scales


def with_static_scales(pages: Pages, scales: jax.Array) -> Pages:
    """Return a pool, which has static scales, with others of the same shape; codes stay as they are."""
    return _pool_of(pages).with_static_scales(scales)


def is_narrow_float(pages: Pages) -> bool:
    """Return True if a pool is of floats under 32 bits, which XLA on CPU copies whole at each write."""
    return _pool_of(pages).is_narrow_float


def needs_implicit_args(*pools: Pages) -> bool:
    """Return True if a function of these pools must run under ``use_implicit_args`` to read them."""
    return any(_pool_of(pages).needs_implicit_args for pages in pools)


def explicit_sharding_of(*pools: Pages) -> NamedSharding | None:
    """Return the sharding of the first array, if all are on a mesh with Explicit axes; else None."""
    shardings = [explicit_sharding(leaf) for leaf in jax.tree_util.tree_leaves(pools)]
    if any(sharding is None for sharding in shardings):
        return None
    return shardings[0]


def mesh_of(pages: Pages) -> Mesh | AbstractMesh | None:
    """Return the mesh of several devices that a pool lies on; None if it lies on one."""
    leaf = jax.tree_util.tree_leaves(pages)[0]
    sharding = getattr(leaf, "sharding", None)
    if isinstance(sharding, NamedSharding) and sharding.mesh.size > 1:
        return sharding.mesh
    return None


def describe(pages: Pages) -> str:
    """Return format, logical dtype and shape of a pool, "int8 bfloat16[8,1024,16,128]"."""
    if getattr(pages, "shape", None) is None:  # what functions of trees put in its place
        return repr(pages)
    kind = format_of(pages) or ("plain" if isinstance(pages, jax.Array) else type(pages).__name__)
    return f"{kind} {short(pages)}"


def to_record(pages: Pages) -> Any:
    """Return a pool as a record holds it: an array, or a dictionary of plain values and arrays.

    Raises:
        TypeError: a kind that has no such form.
    """
    return _pool_of(pages).to_record()


def from_record(data: Mapping[str, Any]) -> Pages:
    """Return the pool of a dictionary that :func:`to_record` made; plain pools are arrays there."""
    readers = {"ExactPages": _exact.from_record, "ValuesInKeys": _in_keys.from_record}
    return readers.get(data["type"], _quantized.from_record)(data)
