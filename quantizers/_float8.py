"""8-bit floats as their bits in a uint8: the conversions that fp8, mxfp8 and nvfp4's scales share."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def encode(units: jax.Array, float8: Any) -> jax.Array:
    """The code of the nearest number of ``float8``, ties to even, saturating; NaN stays NaN."""
    info = jnp.finfo(float8)
    largest = float(info.max)  # beyond it a cast to e4m3 gives NaN, one to e5m2 infinity
    clipped = jnp.clip(units, -largest, largest)
    # Rounded here, since a cast rounds twice where XLA goes by way of float16, as that of JAX 0.4.35 does.
    exponent = lax.bitcast_convert_type(clipped, jnp.uint32) & 0x7F800000
    octave = lax.bitcast_convert_type(exponent, jnp.float32)
    step = jnp.maximum(octave, float(info.smallest_normal)) * float(info.eps)
    rounded = lax.round(clipped / step, lax.RoundingMethod.TO_NEAREST_EVEN) * step
    return lax.bitcast_convert_type(rounded.astype(float8), jnp.uint8)


def decode(codes: jax.Array, float8: Any, dtype: Any) -> jax.Array:
    """The numbers of codes, exactly, as ``dtype``."""
    return lax.bitcast_convert_type(codes, float8).astype(dtype)
