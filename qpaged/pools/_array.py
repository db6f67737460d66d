"""What pools of plain and of quantized arrays share: functions of `qpaged.arrays` that take either."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from qpaged import arrays
from qpaged.pools._pool import Pages, Pool, SlotMapping, Slots
from qpaged.pools._sharding import keep_sharding


@dataclass(frozen=True)
class ArrayPool(Pool):
    """A pool that is an array, plain or quantized."""

    pages: Pages

    def write_slots(self, mapping: SlotMapping, rows: jax.Array) -> Pages:
        return keep_sharding(write_slots, self.pages)(self.pages, mapping, rows)

    def gather_slots(self, indices: jax.Array) -> Slots:
        return arrays.as_slots(arrays.gather_pages(self.pages, indices))

    def clear_pages(self, indices: jax.Array) -> Pages:
        return keep_sharding(arrays.clear_pages, self.pages)(self.pages, indices)

    def copy_pages(self, source: jax.Array, target: jax.Array) -> Pages:
        return keep_sharding(arrays.copy_pages, self.pages)(self.pages, source, target)

    def take_pages(self, indices: jax.Array, sequences: int) -> Pages:
        return keep_sharding(arrays.read_pages, self.pages)(self.pages, indices)

    def put_pages(self, taken: Pages, target: jax.Array) -> Pages:
        return keep_sharding(put_pages, self.pages)(self.pages, taken, target)


def put_pages(pages: Pages, taken: Pages, target: jax.Array) -> Pages:
    """Return ``pages`` with whole pages of others like them; of several with one target the last counts."""
    index = jnp.arange(len(target), dtype=jnp.int32)
    return arrays.put_pages(pages, taken, arrays.final_targets(index, target, pages.shape[1], len(target)))


def write_slots(pages: Pages, mapping: SlotMapping, rows: jax.Array) -> Pages:
    """Return ``pages`` with ``rows`` (tokens, kv_heads, head_dim) written at (page, slot)."""
    return arrays.write_rows(pages, (1, 2), (mapping.page, mapping.slot), rows)
