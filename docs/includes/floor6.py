from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp

import qpaged


@dataclass(frozen=True)
class Floor6(qpaged.PowerOfTwoQuantizer):
    """c = floor(x / s), read back as (c + 1/2) s, with s a power of two and absmax < 32 s."""

    name: ClassVar[str] = "floor6"
    headroom: ClassVar[int] = 5  # absmax < 2 ** 5 · s
    resolution: ClassVar[int] = 1  # the smallest value is 2 ** -1 · s
    bound: ClassVar[float] = 0.5

    def encode(self, units):
        floors = jnp.floor(units)
        # What underflowed to -0 is still below zero.
        floors = jnp.where(jnp.signbit(units), jnp.minimum(floors, -1), floors)
        return jnp.clip(floors, -32, 31).astype(jnp.int8)

    def decode(self, codes, dtype):
        return codes.astype(dtype) + jnp.asarray(0.5, dtype)
