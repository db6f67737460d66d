"""Reads for attention, of plain and of quantized arrays alike: pages, slots, and dots with them."""

from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from qpaged.arrays import _dot, _gather, _moves, _read_format, _reshape
from qpaged.arrays._dtypes import common_dtype
from qpaged.arrays._quantized import QuantizedArray
from qpaged.arrays._scaled_dot import DimensionNumbers

PlainOrQuantized = jax.Array | QuantizedArray
P = TypeVar("P")


def gather_pages(
    pool: PlainOrQuantized,  # [kv_heads, pages, page_size, head_dim]
    pages: jax.Array,  # [n] integers
) -> PlainOrQuantized:
    """Return pages (kv_heads, n, page_size, head_dim), quantized as the pool; zeros where out of range."""
    numbers = lax.GatherDimensionNumbers(
        offset_dims=(0, 2, 3), collapsed_slice_dims=(1,), start_index_map=(1,)
    )
    sizes = (pool.shape[0], 1, *pool.shape[2:])
    index, mode = pages[:, None], lax.GatherScatterMode.FILL_OR_DROP
    if not isinstance(pool, QuantizedArray):
        return lax.gather(pool, index, numbers, sizes, mode=mode, fill_value=0)
    gathered = _gather.gather(pool, index, numbers, sizes, mode, 0)
    assert gathered is not None  # whole pages fit every block
    return gathered


def as_slots(pages: PlainOrQuantized) -> PlainOrQuantized:
    """Return pages (kv_heads, n, page_size, head_dim) as slots (kv_heads, n * page_size, head_dim)."""
    heads, n, page_size, head_dim = pages.shape
    shape = (heads, n * page_size, head_dim)
    if not isinstance(pages, QuantizedArray):
        return pages.reshape(shape)
    slots = _reshape.reshape(pages, shape)
    assert slots is not None  # the channels stay as they are
    return slots


def mask_slots(
    slots: PlainOrQuantized,  # [kv_heads, n, head_dim]
    used: jax.Array,  # [n] bool
) -> PlainOrQuantized:
    """Return slots with code 0, and scale 0 where they have their own, wherever they are not ``used``.

    They may hold NaN, and a weight of 0 times NaN would be NaN. Scales that a page shares stay: pages that no
    one sees were read as zeros.
    """
    kept = used[:, None]
    if not isinstance(slots, QuantizedArray):
        return jnp.where(kept, slots, jnp.zeros((), slots.dtype))

    def mask_scales(scales: jax.Array, _: Any) -> jax.Array:
        has_slot_scales = scales.shape[1] == len(used)
        return jnp.where(kept, scales, jnp.zeros((), scales.dtype)) if has_slot_scales else scales

    codes = jnp.where(kept, slots.codes, jnp.zeros((), slots.codes.dtype))
    return _moves.moved(slots, codes, mask_scales)


def untransformed(pool: P) -> P:
    """Return what the blocks of a pool hold, without inverting the transform; other pools as they are."""
    if not isinstance(pool, QuantizedArray):
        return pool
    return _read_format.untransformed(pool)  # type: ignore[return-value]


def transform_query(query: jax.Array, keys: Any) -> jax.Array:
    """Return the query (..., head_dim) to multiply with :func:`untransformed` keys."""
    if not isinstance(keys, QuantizedArray) or keys.quantizer.transform is None:
        return query
    return _read_format.transform_adjoint(keys.quantizer.transform, query, keys.channel_axis)


def invert_output(out: jax.Array, values: Any) -> jax.Array:
    """Return sums (..., head_dim) of :func:`untransformed` values as the sums of ``values``."""
    if not isinstance(values, QuantizedArray) or values.quantizer.transform is None:
        return out
    return values.quantizer.transform.inverse(out, values.channel_axis)


def dot(lhs: jax.Array, rhs: PlainOrQuantized, dimension_numbers: DimensionNumbers) -> jax.Array:
    """Return ``lax.dot_general`` in float32 accumulation, where ``rhs`` may be quantized."""
    if isinstance(rhs, QuantizedArray):
        return _dot.dot_general(lhs, rhs, dimension_numbers, preferred_element_type=jnp.float32)
    return lax.dot_general(lhs, rhs.astype(lhs.dtype), dimension_numbers, preferred_element_type=jnp.float32)


def to_float32(slots: PlainOrQuantized) -> jax.Array:
    """Return the values of a plain or a quantized array in float32."""
    return slots.dequantize() if isinstance(slots, QuantizedArray) else slots.astype(jnp.float32)


def compute_dtype(query: jax.Array, pool: Any) -> Any:
    """Return the dtype to contract in: the query's, or a wider one that the pool's values need."""
    if isinstance(pool, QuantizedArray) and pool.scales is not None:
        return query.dtype  # codes are exact in bfloat16, and scales are applied in float32
    return common_dtype(query.dtype, pool.dtype)
