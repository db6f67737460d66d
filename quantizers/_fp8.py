"""fp8: one byte of sign, exponent and mantissa, under power-of-two scales."""

from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from qpaged import PowerOfTwoQuantizer
from quantizers import _float8


class Fp8(PowerOfTwoQuantizer):
    """x / s rounded to nearest even in an 8-bit float, stored as its bits in a uint8.

    Integers, because a pool stored as fp8 is widened whole by XLA on CPU at every write; kernels bitcast
    after the load. Scales are powers of two, so growing one only moves exponents: exact, except for values
    that fall among the subnormals, which are rounded again. The roundings of any number of growths add up
    to less than one subnormal step, 2^-resolution s, and two orders of writing differ by no more.

    8 bits an element and 8 per block.
    """

    float8: ClassVar[Any]
    mantissa: ClassVar[int]

    @property
    def order_bound(self) -> float:
        return 0.0 if self.granularity == "token" else 2.0**-self.resolution

    def encode(self, units: jax.Array) -> jax.Array:
        return _float8.encode(units, self.float8)

    def decode(self, codes: jax.Array, dtype: Any) -> jax.Array:
        return _float8.decode(codes, self.float8, dtype)

    def error_bound(self, x: jax.Array, multipliers: jax.Array) -> jax.Array:
        """|x| 2^-(mantissa + 1) where the value is normal, one subnormal step where it is not."""
        return jnp.abs(x) * 2.0 ** -(self.mantissa + 1) + 2.0**-self.resolution * multipliers


@dataclass(frozen=True)
class Fp8E4M3(Fp8):
    """fp8 with 4 exponent and 3 mantissa bits (OCP E4M3FN): absmax < 256 s, subnormal step 2^-9 s."""

    name: ClassVar[str] = "fp8_e4m3"
    bound: ClassVar[float] = 8.0
    headroom: ClassVar[int] = 8
    resolution: ClassVar[int] = 9
    float8: ClassVar[Any] = jnp.float8_e4m3fn
    mantissa: ClassVar[int] = 3


@dataclass(frozen=True)
class Fp8E5M2(Fp8):
    """fp8 with 5 exponent and 2 mantissa bits (OCP E5M2): absmax < 32768 s, subnormal step 2^-16 s."""

    name: ClassVar[str] = "fp8_e5m2"
    bound: ClassVar[float] = 2048.0
    headroom: ClassVar[int] = 15
    resolution: ClassVar[int] = 16
    float8: ClassVar[Any] = jnp.float8_e5m2
    mantissa: ClassVar[int] = 2
