"""nf4 for qpaged: the 4-bit NormalFloat of QLoRA (Dettmers et al. 2023)."""

from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from qpaged import Quantizer

PUBLISHED = np.array([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
])  # fmt: skip
"""Quantiles of the normal distribution, scaled to [-1, 1] (QLoRA, appendix E)."""
# In units of s, a 16th of the largest magnitude, and rounded to what bfloat16 holds exactly.
LEVELS = (16 * PUBLISHED).astype(jnp.bfloat16).astype(np.float32)
MIDPOINTS = ((LEVELS[1:] + LEVELS[:-1]) / 2).tolist()


@dataclass(frozen=True)
class Nf4(Quantizer):
    """x̂ = 16 q[c] s, s = absmax / 16: the nearest of 16 quantiles q of the normal distribution.

    4 bits an element and a float32 per group or token: 4.5 at ``group64``, 5 at ``group32``.
    The error is at most half the widest gap between levels, 2.44 s or 0.152 absmax.
    """

    name: ClassVar[str] = "nf4"
    granularities: ClassVar = ("group64", "group32", "token")
    bits: ClassVar[int] = 4
    bound: ClassVar[float] = float(np.diff(LEVELS).max() / 2) + 2.0**-16  # and float32 roundings

    def scale(self, absmax: jax.Array) -> jax.Array:
        return jnp.where(absmax > 0, jnp.maximum(absmax / 16, 2.0**-120), 0)

    def encode(self, units: jax.Array) -> jax.Array:
        return sum((units > middle).astype(jnp.uint8) for middle in MIDPOINTS)

    def decode(self, codes: jax.Array, dtype: Any) -> jax.Array:
        return jnp.take(jnp.asarray(LEVELS, dtype), codes, mode="clip")
