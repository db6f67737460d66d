"""What pools of plain and of quantized arrays share: functions of `qpaged.arrays` that take either."""

from dataclasses import dataclass

import jax

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


def write_slots(pages: Pages, mapping: SlotMapping, rows: jax.Array) -> Pages:
    """Return ``pages`` with ``rows`` (tokens, kv_heads, head_dim) written at (page, slot)."""
    return arrays.write_rows(pages, (1, 2), (mapping.page, mapping.slot), rows)
