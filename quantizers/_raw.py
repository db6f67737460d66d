"""raw: the values themselves, stored as integers."""

from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import lax

from qpaged import Quantizer


@dataclass(frozen=True)
class Raw(Quantizer):
    """The bits of the logical dtype as unsigned integers of its width; lossless, NaN and inf included.

    The same values as a plain pool, for platforms where XLA widens a whole 16- or 8-bit float pool at
    every write, as it does on CPU.
    """

    granularity: str = "element"

    name: ClassVar[str] = "raw"
    granularities: ClassVar = ("element",)
    scale_dtype: ClassVar[Any] = None
    bound: ClassVar[float] = 0.0

    def code_dtype(self, dtype: Any) -> Any:
        return jnp.dtype(f"uint{8 * jnp.dtype(dtype).itemsize}")

    def scale(self, absmax: jax.Array) -> jax.Array:
        raise TypeError("raw has no scales, as scale_dtype says, which is None.")

    def encode(self, units: jax.Array) -> jax.Array:
        return lax.bitcast_convert_type(units, self.code_dtype(units.dtype))

    def decode(self, codes: jax.Array, dtype: Any) -> jax.Array:
        return lax.bitcast_convert_type(codes, dtype)

    def error_bound(self, x: jax.Array, multipliers: jax.Array) -> jax.Array:
        return jnp.zeros(x.shape, jnp.float32)
