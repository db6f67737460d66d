"""mxfp8 and mxfp4: the OCP Microscaling formats, version 1.0 (2023)."""

from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import lax

from qpaged import Quantizer
from quantizers import _e2m1, _float8

MANTISSA_BITS = 23
NAN = 255


class MX(Quantizer):
    """Blocks of 32 elements share X = 2^(floor(log2(absmax)) - emax), an E8M0 byte; elements saturate.

    OCP MX v1.0, section 6.3, with round to nearest even. emax is the exponent of the element's largest
    number. A block of zeros stores byte 0; other blocks at least byte 1, X = 2^-126, so that X is a normal
    float32 (the specification leaves underflow to the implementation).
    """

    granularities: ClassVar[tuple[str, ...]] = ("group32",)
    scale_dtype: ClassVar[Any] = jnp.uint8
    nan_scale: ClassVar[int] = NAN
    emax: ClassVar[int]

    def scale(self, absmax: jax.Array) -> jax.Array:
        biased = (lax.bitcast_convert_type(absmax, jnp.uint32) >> MANTISSA_BITS).astype(jnp.int32)
        return jnp.where(absmax > 0, jnp.maximum(biased - self.emax, 1), 0).astype(jnp.uint8)

    def multiplier(self, scales: jax.Array) -> jax.Array:
        factor = lax.bitcast_convert_type(scales.astype(jnp.uint32) << MANTISSA_BITS, jnp.float32)
        return jnp.where(scales == NAN, jnp.nan, factor)

    def error_bound(self, x: jax.Array, multipliers: jax.Array) -> jax.Array:
        return self.unit_error(x / jnp.where(multipliers > 0, multipliers, 1)) * multipliers

    def unit_error(self, units: jax.Array) -> jax.Array:
        """The largest error of an element, in units of the scale."""
        raise NotImplementedError


@dataclass(frozen=True)
class Mxfp8(MX):
    """MXFP8 E4M3: 8-bit floats, blocks of 32 channels, E8M0 scales (OCP MX v1.0).

    8.25 bits an element. Absmax is in [256 X, 512 X) and the largest element 448, so that values beyond
    saturate: the error is at most 64 X there, 2^-4 of the value elsewhere, and 2^-10 X among the subnormals.
    """

    name: ClassVar[str] = "mxfp8"
    emax: ClassVar[int] = 8
    bound: ClassVar[float] = 64.0

    def encode(self, units: jax.Array) -> jax.Array:
        return _float8.encode(units, jnp.float8_e4m3fn)

    def decode(self, codes: jax.Array, dtype: Any) -> jax.Array:
        return _float8.decode(codes, jnp.float8_e4m3fn, dtype)

    def unit_error(self, units: jax.Array) -> jax.Array:
        size = jnp.abs(units)
        return jnp.maximum(jnp.maximum(size * 2.0**-4, 2.0**-10), size - 448)


@dataclass(frozen=True)
class Mxfp4(MX):
    """MXFP4: E2M1 floats, two to a byte, blocks of 32 channels, E8M0 scales (OCP MX v1.0).

    4.25 bits an element. Absmax is in [4 X, 8 X) and the largest element 6, so that values beyond saturate:
    the error is at most 2 X there, a quarter of the value elsewhere, and X / 4 among the subnormals.
    """

    name: ClassVar[str] = "mxfp4"
    emax: ClassVar[int] = 2
    bits: ClassVar[int] = 4
    bound: ClassVar[float] = 2.0

    def encode(self, units: jax.Array) -> jax.Array:
        return _e2m1.encode(units)

    def decode(self, codes: jax.Array, dtype: Any) -> jax.Array:
        return _e2m1.decode(codes, dtype)

    def unit_error(self, units: jax.Array) -> jax.Array:
        return _e2m1.unit_error(units)
