"""The decoded codes of a pool as numbers of a kernel's dtype, exactly."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

from qpaged._compat import outside_of_meshes
from qpaged.arrays import QuantizedArray, pack


class Numbers(NamedTuple):
    """A pool's decoded codes in a kernel's dtype.

    Attributes:
        array: (kv_heads, pages, page_size, head_dim), the decoded codes times ``per_unit``.
        per_unit: 1, or 2 if the codes stand for halves.
    """

    array: jax.Array
    per_unit: float


def as_numbers(pool: QuantizedArray, dtypes: Sequence[DTypeLike]) -> Numbers | None:
    """Return a pool's decoded codes in the first dtype that represents them all; None if none does."""
    codes, values = _every_code(pool)
    is_trellis = pool.quantizer.state_bits is not None  # its codes are read together
    for dtype in () if is_trellis else dtypes:
        # The bits of a code are those of its value: no copy is needed.
        if np.array_equal(codes.view(dtype).astype(np.float32), values, equal_nan=True):
            return Numbers(lax.bitcast_convert_type(pool.unpacked(), dtype), 1.0)
    for dtype in dtypes:
        for per_unit in (1.0, 2.0):
            if _represents(dtype, values * per_unit):
                return Numbers((pool.values(jnp.float32) * per_unit).astype(dtype), per_unit)
    return None


def _every_code(pool: QuantizedArray) -> tuple[np.ndarray, np.ndarray]:
    """Return every code, or state, that there is, and the float32 values that they decode to."""
    bits, state_bits = pool.quantizer.bits, pool.quantizer.state_bits
    with outside_of_meshes():
        if state_bits is not None:
            states = np.arange(2**state_bits, dtype=np.int32)
            return states, np.asarray(pool.quantizer.decode(jnp.asarray(states), jnp.float32))
        every_code = np.arange(2**bits, dtype=np.uint8).reshape(1, 1, 1, -1)
        stored = np.asarray(pack(jnp.asarray(every_code), bits, -1)).view(pool.codes.dtype)
        array = pool.like(jnp.asarray(stored), pool.parts)
        return np.asarray(array.unpacked()), np.asarray(array.values(jnp.float32))


def _represents(dtype: DTypeLike, values: np.ndarray) -> bool:
    """Return True if all values are numbers of the dtype."""
    if jnp.issubdtype(dtype, jnp.integer):
        largest = np.float32(jnp.iinfo(dtype).max)
    else:
        largest = np.float32(jnp.finfo(dtype).max)
    if not (np.abs(values) <= largest).all():
        return False
    return np.array_equal(values.astype(dtype).astype(np.float32), values)


def magnitudes(pool: QuantizedArray) -> str:
    """Return the range of the decoded codes, as the reason of an error."""
    sizes = np.abs(_every_code(pool)[1])
    sizes = sizes[np.isfinite(sizes) & (sizes > 0)]
    return f"reads its codes as numbers of magnitude {sizes.min():g} to {sizes.max():g}"
