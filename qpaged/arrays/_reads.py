"""Reads of pools, plain or quantized, for code that is written for both."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from qpaged.arrays import _dot, _moves
from qpaged.arrays._quantized import QuantizedArray, common_dtype
from qpaged.arrays._views import adjoint, stored


def take_pages(pool: Any, pages: jax.Array) -> Any:
    """Pages (kv_heads, n, page_size, head_dim) of a pool, in its format; exact zeros where out of range."""
    numbers = lax.GatherDimensionNumbers(
        offset_dims=(0, 2, 3), collapsed_slice_dims=(1,), start_index_map=(1,)
    )
    sizes = (pool.shape[0], 1, *pool.shape[2:])
    arguments = (pages[:, None], numbers, sizes)
    if isinstance(pool, QuantizedArray):
        return _moves.gather(pool, *arguments, lax.GatherScatterMode.FILL_OR_DROP, 0)
    return lax.gather(pool, *arguments, mode=lax.GatherScatterMode.FILL_OR_DROP, fill_value=0)


def as_slots(pages: Any) -> Any:
    """Pages (kv_heads, n, page_size, head_dim) as slots in order, (kv_heads, n * page_size, head_dim)."""
    shape = (pages.shape[0], pages.shape[1] * pages.shape[2], pages.shape[3])
    return _moves.reshape(pages, shape) if isinstance(pages, QuantizedArray) else pages.reshape(shape)


def keep_slots(slots: Any, used: jax.Array) -> Any:
    """Slots (kv_heads, n, head_dim) with those that are not ``used`` (n,) made harmless: never NaN."""
    kept = used[:, None]
    if not isinstance(slots, QuantizedArray):
        return jnp.where(kept, slots, jnp.zeros((), slots.dtype))

    def scales(s, _):
        return jnp.where(kept, s, jnp.zeros((), s.dtype)) if s.shape[1] == len(used) else s

    return _moves.move(slots, jnp.where(kept, slots.codes, jnp.zeros((), slots.codes.dtype)), scales)


def contracted(query: jax.Array, keys: Any) -> tuple[jax.Array, Any]:
    """Query and keys (..., head_dim), with the same products, whose keys have nothing left to transform."""
    if not (isinstance(keys, QuantizedArray) and keys.quantizer.transforms):
        return query, keys
    return adjoint(keys.quantizer, query, keys.channel_axis), stored(keys)


def weighed(values: Any) -> tuple[Any, Callable[[jax.Array], jax.Array]]:
    """Values (..., head_dim) with nothing left to transform; what makes sums of them sums of the given."""
    if not (isinstance(values, QuantizedArray) and values.quantizer.transforms):
        return values, lambda out: out
    return stored(values), lambda out: values.quantizer.inverse(out, values.channel_axis)


def dot(lhs: jax.Array, rhs: Any, dimension_numbers: Any) -> jax.Array:
    """``lax.dot_general`` in float32 accumulation, where ``rhs`` may be quantized."""
    if isinstance(rhs, QuantizedArray):
        return _dot.dot_general(lhs, rhs, dimension_numbers, preferred_element_type=jnp.float32)
    return lax.dot_general(lhs, rhs.astype(lhs.dtype), dimension_numbers, preferred_element_type=jnp.float32)


def compute_dtype(query: jax.Array, pool: Any) -> Any:
    """The dtype to contract in: the query's, or a wider one where the pool's values do not fit into that."""
    codes = isinstance(pool, QuantizedArray) and pool.scales is not None
    return query.dtype if codes else common_dtype(query.dtype, pool.dtype)
