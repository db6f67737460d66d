"""Rounding to bfloat16: on CPU by hand, where XLA's own is slow and its fusion into a dot slower yet.

Where the processor has no instruction for it, XLA rounds element by element.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax


@jax.custom_jvp
def to_bfloat16(x: jax.Array) -> jax.Array:
    """Return float32 ``x`` as the nearest bfloat16; which one at a tie depends on the platform."""
    return lax.platform_dependent(x, cpu=_round_bits, default=lambda x: x.astype(jnp.bfloat16))


def decode_to_bfloat16(decode: Callable[..., jax.Array], codes: jax.Array) -> jax.Array:
    """Return ``decode(codes, dtype)`` in bfloat16, in which it must be exact."""
    return lax.platform_dependent(
        codes,
        cpu=lambda codes: _upper_half(lax.bitcast_convert_type(decode(codes, jnp.float32), jnp.uint32)),
        default=lambda codes: decode(codes, jnp.bfloat16),
    )


@to_bfloat16.defjvp
def _(primals, tangents):
    return to_bfloat16(*primals), tangents[0].astype(jnp.bfloat16)


def _round_bits(x: jax.Array) -> jax.Array:
    """Add half a unit to the magnitude and cut off the bits below: ties go away from zero."""
    x = jnp.where(jnp.isnan(x), jnp.nan, x)  # the addition could carry other NaNs over into the sign
    return _upper_half(lax.bitcast_convert_type(x, jnp.uint32) + jnp.uint32(1 << 15))


def _upper_half(bits: jax.Array) -> jax.Array:
    """Return the upper half of float32 ``bits``, which is the bfloat16 next to them towards zero."""
    return lax.bitcast_convert_type((bits >> 16).astype(jnp.uint16), jnp.bfloat16)
