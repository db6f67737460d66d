"""Whole pages of a pool, cleared and copied in every array of it: codes and scales together."""

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp

from qpaged._platforms import by_platform
from qpaged.arrays import _tpu_write
from qpaged.arrays._quantize import quantize, quantize_under
from qpaged.arrays._quantized import BlockParts, QuantizedArray
from qpaged.arrays._scatter import gather_rows, scatter_rows

PAGE_AXIS = 1  # of every array of a pool

PoolArray = TypeVar("PoolArray", jax.Array, QuantizedArray)  # [kv_heads, pages, page_size, head_dim]


def clear_pages(
    pool: PoolArray,
    pages: jax.Array,  # [n] int32
) -> PoolArray:
    """Return a pool with zeros for these pages of its arrays; static scales stay. Out of range is dropped."""
    if not isinstance(pool, QuantizedArray):
        return _clear(pool, pages)

    def clear_scales(part: jax.Array) -> jax.Array:
        return by_platform(part, pages, default=_clear, tpu=_clear_on_tpu)

    return pool.with_stored(_clear(pool.stored, pages), _map_of_pages(pool, clear_scales))


def copy_pages(
    pool: PoolArray,
    source: jax.Array,  # [n] int32
    target: jax.Array,  # [n] int32
) -> PoolArray:
    """Return a pool with pages ``source`` copied to ``target`` in all its arrays.

    All sources are read before any target is written. A pair with a page out of range is dropped; of several
    pairs with one target the last counts.
    """
    target = final_targets(source, target, pool.shape[PAGE_AXIS])
    if not isinstance(pool, QuantizedArray):
        return _copy(pool, source, target)

    def copy_scales(part: jax.Array) -> jax.Array:
        return by_platform(part, source, target, default=_copy, tpu=_copy_on_tpu)

    return pool.with_stored(_copy(pool.stored, source, target), _map_of_pages(pool, copy_scales))


def put_pages(
    pool: PoolArray,
    pages: jax.Array | QuantizedArray,  # [kv_heads, n, page_size, head_dim]
    target: jax.Array,  # [n] int32, each once
) -> PoolArray:
    """Return a pool with whole pages in place of those at ``target``, quantized as the pool is, if it is.

    A scale is chosen from its whole block, whatever was there before, unless it is static. Pages that are
    quantized as the pool is, as of :func:`read_pages`, are moved bit for bit. Out of range is dropped.
    """
    if not isinstance(pool, QuantizedArray):
        return _put(pool, target, pages.astype(pool.dtype))
    if isinstance(pages, QuantizedArray):
        new = pages
    elif pool.quantizer.has_static_scales:
        new = quantize_under(pool, pages)
    else:
        block = (1, 1, *pool.block[2:])
        new = quantize(pages, pool.quantizer, block, pool.dtype, pool.channel_axis)
    new = new.like(new.codes, new.parts, slots_per_row=pool.slots_per_row)
    stored = by_platform(pool.stored, target, new.stored, default=_put, tpu=_put_codes_on_tpu)

    def put_scales(part: jax.Array, of_new: jax.Array) -> jax.Array:
        return by_platform(part, target, of_new, default=_put, tpu=_put_on_tpu)

    return pool.with_stored(stored, _map_of_pages(pool, put_scales, new.parts))


def _map_of_pages(pool: QuantizedArray, change: Callable[..., jax.Array], *others: BlockParts) -> BlockParts:
    """Return the parts of a pool with ``change`` applied to those of its pages: static scales stay."""
    return pool.parts if pool.quantizer.has_static_scales else pool.parts.map(change, *others)


def read_pages(
    pool: PoolArray,
    pages: jax.Array,  # [n] int32
) -> PoolArray:
    """Return pages (kv_heads, n, page_size, head_dim) in the format of the pool; any where out of range."""
    if not isinstance(pool, QuantizedArray):
        return _take(pool, pages)

    def take(part: jax.Array) -> jax.Array:
        return by_platform(part, pages, default=_take, tpu=_take_on_tpu)

    return pool.with_stored(_take(pool.stored, pages), _map_of_pages(pool, take))


def _take(part: jax.Array, pages: jax.Array) -> jax.Array:
    return gather_rows(part, (PAGE_AXIS,), pages[:, None]).swapaxes(0, 1)


def _take_on_tpu(scales: jax.Array, pages: jax.Array) -> jax.Array:
    """Return what :func:`_take` does, of scales: XLA would copy all of them into another layout."""
    return _tpu_write.gather_scales(scales, pages).swapaxes(0, 1)


def _put(part: jax.Array, target: jax.Array, pages: jax.Array) -> jax.Array:
    return scatter_rows(part, (PAGE_AXIS,), target[:, None], pages.swapaxes(0, 1))


def _put_codes_on_tpu(codes: jax.Array, target: jax.Array, pages: jax.Array) -> jax.Array:
    """Return what :func:`_put` does, one head at a time: XLA would copy the pool for slices of all heads."""
    return _tpu_write.scatter_pages(codes, target, pages.swapaxes(0, 1))


def _put_on_tpu(scales: jax.Array, target: jax.Array, pages: jax.Array) -> jax.Array:
    """Return what :func:`_put` does, of scales: XLA would copy all of them into another layout and back."""
    return _tpu_write.scatter_scales(scales, target, pages.swapaxes(0, 1))


def _clear(part: jax.Array, pages: jax.Array) -> jax.Array:
    zeros = jnp.zeros((len(pages), part.shape[0], *part.shape[2:]), part.dtype)
    return scatter_rows(part, (PAGE_AXIS,), pages[:, None], zeros)


def _clear_on_tpu(scales: jax.Array, pages: jax.Array) -> jax.Array:
    """Return what :func:`_clear` does, of scales: XLA would copy all of them into another layout and back."""
    zeros = jnp.zeros((len(pages), scales.shape[0], *scales.shape[2:]), scales.dtype)
    return _tpu_write.scatter_scales(scales, pages, zeros)


def _copy(part: jax.Array, source: jax.Array, target: jax.Array) -> jax.Array:
    rows = gather_rows(part, (PAGE_AXIS,), source[:, None])
    return scatter_rows(part, (PAGE_AXIS,), target[:, None], rows)


def _copy_on_tpu(scales: jax.Array, source: jax.Array, target: jax.Array) -> jax.Array:
    """Return what :func:`_copy` does, of scales: XLA would copy all of them into another layout and back."""
    return _tpu_write.scatter_scales(scales, target, _tpu_write.gather_scales(scales, source))


def final_targets(
    source: jax.Array, target: jax.Array, num_pages: int, num_sources: int | None = None
) -> jax.Array:
    """Return ``target``, but "no page" for pairs out of range and all but the last pair of a target.

    Sources are below ``num_sources``, or ``num_pages`` if it is None.
    """
    num_sources = num_pages if num_sources is None else num_sources
    inside = (source >= 0) & (source < num_sources) & (target >= 0) & (target < num_pages)
    target = jnp.where(inside, target, num_pages)
    order = jnp.argsort(target, stable=True)
    in_order = target[order]
    # The sort is stable, so the last of a run of equal targets is the last pair.
    is_last = jnp.append(in_order[1:] != in_order[:-1], True)
    keeps = jnp.zeros(len(target), bool).at[order].set(is_last)
    return jnp.where(keeps, target, num_pages)
