"""bfloat16 by its bits: roundings in a given direction, and numbers in integer words.

Scales are stored as integers for the reason that codes are: XLA on CPU widens a whole bfloat16 array at every
write to it.
"""

import jax
import jax.numpy as jnp
from jax import lax

LOW = 0xFFFF  # the bits that float32 has below bfloat16
NAN = 0x7FC0
LARGEST = float(jnp.finfo(jnp.bfloat16).max)
SMALLEST = float(jnp.finfo(jnp.float32).smallest_normal)


def away_from_zero(x: jax.Array) -> jax.Array:
    """float32 ``x``, at least the smallest normal number in magnitude, rounded to bfloat16 away from zero."""
    x = jnp.copysign(jnp.maximum(jnp.abs(x), SMALLEST), x)
    return _float32((_bits(x) + jnp.uint32(LOW)) & ~jnp.uint32(LOW))


def nearest(x: jax.Array) -> jax.Array:
    """float32 ``x`` that does not overflow, rounded to bfloat16; halves away from zero."""
    return _float32((_bits(x) + jnp.uint32(LOW // 2 + 1)) & ~jnp.uint32(LOW))


def toward_zero(x: jax.Array) -> jax.Array:
    """float32 ``x`` rounded to bfloat16 toward zero."""
    return _float32(_bits(x) & ~jnp.uint32(LOW))


def word(x: jax.Array) -> jax.Array:
    """float32 ``x`` that bfloat16 holds, as the bits of that in a uint16."""
    return (_bits(x) >> 16).astype(jnp.uint16)


def of_word(bits: jax.Array) -> jax.Array:
    """What :func:`word` took, float32."""
    return _float32(bits.astype(jnp.uint32) << 16)


def paired(first: jax.Array, second: jax.Array) -> jax.Array:
    """Two float32 arrays that bfloat16 holds, as one of uint32; the first in the upper half."""
    return _bits(first) | (_bits(second) >> 16)


def first_of(pair: jax.Array) -> jax.Array:
    """The first of what :func:`paired` took, float32."""
    return _float32(pair & ~jnp.uint32(LOW))


def second_of(pair: jax.Array) -> jax.Array:
    """The second of what :func:`paired` took, float32."""
    return _float32(pair << 16)


def _bits(x: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)


def _float32(bits: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(bits, jnp.float32)
