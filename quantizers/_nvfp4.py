"""nvfp4: NVIDIA's 4-bit float with two levels of scales, the second one local."""

from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import lax

from qpaged import Quantizer
from quantizers import _e2m1, _float8

MANTISSA_BITS = 23
LARGEST_SCALE = 448.0  # of E4M3
SMALLEST_SCALE = 2.0**-9
NAN = 0x7F
SMALLEST_GLOBAL = 11  # the byte of 2^-116: times the smallest scale and element still a normal float32


class PowerOfTwoPerToken:
    """The second level: the power of two g with absmax / (6 · 448) < g, one byte for a token's head."""

    dtype = jnp.uint8

    def scale(self, absmax: jax.Array) -> jax.Array:
        """Return the stored second-level scale for the largest magnitude in all its blocks (float32)."""
        exact = absmax * jnp.float32(1 / (_e2m1.LARGEST * LARGEST_SCALE))
        biased = (lax.bitcast_convert_type(exact, jnp.uint32) >> MANTISSA_BITS).astype(jnp.int32)
        return jnp.where(absmax > 0, jnp.maximum(biased + 1, SMALLEST_GLOBAL), 0).astype(jnp.uint8)

    def multiplier(self, stored: jax.Array) -> jax.Array:
        """Return stored second-level scales as float32 factors."""
        return lax.bitcast_convert_type(stored.astype(jnp.uint32) << MANTISSA_BITS, jnp.float32)


@dataclass(frozen=True)
class Nvfp4(Quantizer):
    """NVFP4: E2M1 floats, two to a byte; E4M3 scales of 16 channels; a power of two per token and head.

    The block's scale is t = E4M3(absmax / (6 g)), at least 2^-9, and x̂ = element · t g. NVIDIA's g is one
    float32 for a whole tensor and wants calibration; here it is the power of two with
    absmax / (6 · 448) < g of each token and head, one byte: it depends on nothing but the token, and a layer
    whose values are 1e-6 keeps its accuracy.

    4.5 bits an element and 8 per token and head: 4.5625 at head_dim 128. The error is at most a quarter of
    the value (t g / 4 for the smallest). The rounding of t may push the block's largest beyond 6 t g, where
    it saturates: by at most 2^-4 of it, but by up to 3 t g in a block 2^17 times smaller than the token's
    largest, where t is a subnormal.
    """

    name: ClassVar[str] = "nvfp4"
    granularities: ClassVar = ("group16",)
    bits: ClassVar[int] = 4
    scale_dtype: ClassVar[Any] = jnp.uint8
    global_scale: ClassVar[PowerOfTwoPerToken] = PowerOfTwoPerToken()
    bound: ClassVar[float] = 3.0
    nan_scale: ClassVar[int] = NAN

    def scale(self, absmax: jax.Array) -> jax.Array:
        # Never 0: the token's power of two says whether anything is there.
        scale = jnp.clip(absmax * jnp.float32(1 / _e2m1.LARGEST), SMALLEST_SCALE, LARGEST_SCALE)
        return _float8.encode(scale, jnp.float8_e4m3fn)

    def multiplier(self, scales: jax.Array) -> jax.Array:
        # Spelled out, since XLA on CPU would convert the scale anew, and slowly, for each element of a block.
        size = scales.astype(jnp.uint32) & NAN
        normal = lax.bitcast_convert_type((size << 20) + jnp.uint32(120 << MANTISSA_BITS), jnp.float32)
        subnormal = size.astype(jnp.float32) * SMALLEST_SCALE
        number = jnp.where(size == NAN, jnp.nan, jnp.where(size < 8, subnormal, normal))
        return jnp.where(scales > NAN, -number, number)

    def encode(self, units: jax.Array) -> jax.Array:
        return _e2m1.encode(units)

    def decode(self, codes: jax.Array, dtype: Any) -> jax.Array:
        return _e2m1.decode(codes, dtype)

    def error_bound(self, x: jax.Array, multipliers: jax.Array) -> jax.Array:
        return _e2m1.unit_error(x / jnp.where(multipliers > 0, multipliers, 1)) * multipliers
