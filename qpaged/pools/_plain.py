"""Plain pools: an array of the logical dtype."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from qpaged.pools._array import ArrayPool
from qpaged.pools._pool import PoolBytes, bytes_of


@dataclass(frozen=True)
class PlainPool(ArrayPool):
    """A pool that is an array."""

    pages: jax.Array

    @property
    def is_narrow_float(self) -> bool:
        return jnp.issubdtype(self.pages.dtype, jnp.floating) and self.pages.dtype.itemsize < 4

    def count_bytes(self) -> PoolBytes:
        return PoolBytes(codes=bytes_of(self.pages), scales=0)

    def fill_lane_rows(self) -> jax.Array:
        return self.pages  # XLA owns the layout of a plain array

    def to_record(self) -> jax.Array:
        return self.pages
