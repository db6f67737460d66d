from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp

import qpaged


@dataclass(frozen=True)
class Nearest6(qpaged.PowerOfTwoQuantizer):
    """c = round(x / s), with s a power of two and absmax < 32 s: rounded again at each growth."""

    name: ClassVar[str] = "nearest6"
    headroom: ClassVar[int] = 5
    resolution: ClassVar[int] = 1
    bound: ClassVar[float] = 1.0  # 1/2 + 1/4 + 1/8 + ...

    @property
    def order_bound(self):
        return 0.0 if self.granularity == "token" else 1.0

    def encode(self, units):
        return jnp.clip(jnp.round(units), -31, 31).astype(jnp.int8)

    def decode(self, codes, dtype):
        return codes.astype(dtype)
