"""What the kernels have in common: how the pages of a pool are stored, and what of a sequence is seen."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import jax
import jax.numpy as jnp
from jax import lax

from qpaged.arrays import QuantizedArray, refused

BITS = 32  # in which codes that share a byte are taken apart


@dataclass(frozen=True)
class Layout:
    """The static description of a pool (kv_heads, pages, page_size, head_dim).

    Attributes:
        quantizer: None where the pool is plain.
        dtype: the logical dtype.
        page_size: slots of a page.
        head_dim: channels of a slot.
        places: codes in a byte; channel c is at place c mod places.
        per_slot: whether scales are the slot's own.
        groups: scales along the channels; 0 where there are none.
        shifted: whether scales carry offsets.
        stored_bytes: bytes of a slot.
    """

    quantizer: Any
    dtype: Any
    page_size: int
    head_dim: int
    places: int = 1
    per_slot: bool = False
    groups: int = 0
    shifted: bool = False
    stored_bytes: int = 0

    @classmethod
    def of(cls, pool: Any) -> Self:
        made = {"dtype": pool.dtype, "page_size": pool.shape[2], "head_dim": pool.shape[3]}
        if not isinstance(pool, QuantizedArray):
            return cls(None, **made, stored_bytes=pool.shape[3] * pool.dtype.itemsize)
        stored_bytes = pool.shape[3] // pool.packing * pool.folded.dtype.itemsize
        made |= {"places": pool.packing, "stored_bytes": stored_bytes}
        scales, quantizer = pool.scales, pool.quantizer
        if scales is not None:
            shifted = jax.eval_shape(quantizer.shift, scales) is not None
            made |= {"per_slot": scales.shape[2] > 1, "groups": scales.shape[3], "shifted": shifted}
        return cls(quantizer, **made)

    @property
    def width(self) -> int:
        """Stored elements of a slot."""
        return self.head_dim // self.places

    def codes(self, stored: jax.Array, place: int) -> jax.Array:
        """The codes at a place of each stored element; within a kernel."""
        if self.places == 1:
            return stored
        bits, dtype = BITS // (4 * self.places), self.quantizer.code_dtype(self.dtype)
        signed = jnp.issubdtype(dtype, jnp.signedinteger)
        high = lax.shift_left(stored.astype(jnp.int32), jnp.int32(BITS - bits * (place + 1)))
        down = lax.shift_right_arithmetic if signed else lax.shift_right_logical
        return down(high, jnp.int32(BITS - bits)).astype(dtype)


def pool_refusal(pool: QuantizedArray, decoded: Any) -> str | None:
    """Why no kernel takes the format of a pool, decoded to that dtype; None if one may."""
    quantizer, layout = pool.quantizer, Layout.of(pool)
    if pool.outer is not None or pool.offsets is not None:
        return f"{quantizer} has scales of two levels"
    if not quantizer.tiled:
        return f"{quantizer} is declared not to be made of tile functions"
    parts: list[tuple[str, Callable[[Any], Any], Any]] = [
        ("decode", lambda codes: quantizer.decode(codes, decoded), quantizer.code_dtype(pool.dtype))
    ]
    if layout.groups:
        parts.append(("multiplier", quantizer.multiplier, pool.scales.dtype))
    if layout.shifted:
        parts.append(("shift", quantizer.shift, pool.scales.dtype))
    for method, function, dtype in parts:
        reason = refused(function, dtype)
        if reason is not None:
            return f"{method} of {quantizer} {reason}"
    return None


def padded(array: jax.Array, multiple: int, fill: int, axis: int = 0) -> jax.Array:
    """``array`` with ``fill`` appended along ``axis`` up to a multiple."""
    missing = -array.shape[axis] % multiple
    widths = [(0, 0)] * array.ndim
    widths[axis] = (0, missing)
    return jnp.pad(array, widths, constant_values=fill) if missing else array


def bounds(position: jax.Array, window: int | None) -> jax.Array:
    """(tiles, 2): the first and the last slot that any query of a tile sees; 0 and -1 where none does."""
    last = position.max(axis=1)
    if window is None:
        first = jnp.zeros_like(last)
    else:
        lowest = jnp.where(position >= 0, position, last[:, None]).min(axis=1)
        first = jnp.maximum(lowest - (window - 1), 0)
    return jnp.stack([first, last], axis=1)
