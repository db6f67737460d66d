"""The growth of shared scales that works for every format, which others refine."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

if TYPE_CHECKING:
    from qpaged.formats._contract import Quantizer


@dataclass(frozen=True)
class FitAgain:
    """Growth that fits a block to its new extremes, and rounds its codes again under the larger scale.

    Only the rows that are written now are fitted: it is asked only where they need a larger scale than the
    block has, so that what the block holds already fits. This is so where ``fit`` depends on the largest
    magnitude alone; other formats have a growth of their own.

    Attributes:
        quantizer: the format whose scales grow.
    """

    quantizer: "Quantizer"

    def covers(self, scales: jax.Array, low: jax.Array, high: jax.Array) -> jax.Array:
        """Return True where blocks take the extremes ``low`` and ``high`` under the scales they have."""
        needed = self.quantizer.multiplier(self.quantizer.fit(low, high))
        return jnp.abs(needed) <= jnp.abs(self.quantizer.multiplier(scales))

    def grown_scale(
        self, scales: jax.Array, greatest_code: jax.Array, low: jax.Array, high: jax.Array
    ) -> jax.Array:
        """Return the stored scales of blocks that do not cover new extremes.

        Args:
            scales: what was stored.
            greatest_code: of each block.
            low: the least of what is written now.
            high: the greatest of it.
        """
        return self.quantizer.fit(low, high)

    def requantize(self, codes: jax.Array, old: jax.Array, new: jax.Array) -> jax.Array:
        """Return ``codes`` under ``old`` stored scales as codes under larger ``new`` ones (broadcast)."""
        ratio = self.quantizer.multiplier(old) / self.quantizer.multiplier(new)
        return self.quantizer.encode(self.quantizer.decode(codes, jnp.float32) * ratio)
