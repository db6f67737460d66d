"""Plain pools: an array of the logical dtype."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from qpaged import arrays
from qpaged.arrays import as_slots, gather_pages, write_rows
from qpaged.pools._pool import Pool, PoolBytes, SlotMapping, Slots, bytes_of
from qpaged.pools._sharding import keep_sharding


@dataclass(frozen=True)
class PlainPool(Pool):
    """A pool that is an array."""

    pages: jax.Array

    @property
    def is_narrow_float(self) -> bool:
        return jnp.issubdtype(self.pages.dtype, jnp.floating) and self.pages.dtype.itemsize < 4

    def write_slots(self, mapping: SlotMapping, rows: jax.Array) -> jax.Array:
        return keep_sharding(write_slots, self.pages)(self.pages, mapping, rows)

    def gather_slots(self, indices: jax.Array) -> Slots:
        return as_slots(gather_pages(self.pages, indices))

    def clear_pages(self, indices: jax.Array) -> jax.Array:
        return keep_sharding(arrays.clear_pages, self.pages)(self.pages, indices)

    def copy_pages(self, source: jax.Array, target: jax.Array) -> jax.Array:
        return keep_sharding(arrays.copy_pages, self.pages)(self.pages, source, target)

    def count_bytes(self) -> PoolBytes:
        return PoolBytes(codes=bytes_of(self.pages), scales=0)

    def fill_lane_rows(self) -> jax.Array:
        return self.pages  # XLA owns the layout of a plain array

    def to_record(self) -> jax.Array:
        return self.pages


def write_slots(pages: jax.Array, mapping: SlotMapping, rows: jax.Array) -> jax.Array:
    """Return ``pages`` with ``rows`` (tokens, kv_heads, head_dim) written at (page, slot)."""
    return write_rows(pages, (1, 2), mapping, rows)
