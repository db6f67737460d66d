"""The scales of slots, one by one, in the order in which TPUs keep them.

A TPU keeps the pages of scales (kv_heads, pages, page_size, groups) along its lanes, in tiles of 128 by as
many groups, or slots, as it packs together. For scales that are read or written in another order, or in
longer slices, XLA would bring the whole pool's into that one first, at each call.
"""

from dataclasses import dataclass

import jax

from qpaged.arrays._folds import LANES

ROWS = 8  # of a tile


@dataclass(frozen=True)
class Order:
    """The order of scales (heads, pages, slots, groups), in tiles of ``rows`` groups, or slots, and ``lanes``
    pages."""

    heads: int
    pages: int
    slots: int
    groups: int
    rows: int
    lanes: int

    @classmethod
    def of(cls, scales: jax.Array) -> "Order":
        heads, pages, slots, groups = scales.shape
        if pages % LANES:
            return cls(heads, pages, slots, groups, rows=1, lanes=pages)
        along = groups if groups > 1 else slots if scales.dtype.itemsize < 4 else 1
        rows = ROWS if along % ROWS == 0 else along
        return cls(heads, pages, slots, groups, rows=rows, lanes=LANES)

    @property
    def tiles(self) -> int:
        """Of the slots and groups of a page."""
        return self.slots * self.groups // self.rows

    def flat(self, scales: jax.Array) -> jax.Array:
        """All of them, as (heads · pages · slots · groups,)."""
        shape = self.heads, -1, self.lanes, self.tiles, self.rows
        return scales.reshape(shape).transpose(0, 3, 1, 4, 2).reshape(-1)

    def back(self, flat: jax.Array) -> jax.Array:
        """The inverse of :meth:`flat`."""
        tiles = flat.reshape(self.heads, self.tiles, -1, self.rows, self.lanes)
        return tiles.transpose(0, 2, 4, 1, 3).reshape(self.heads, self.pages, self.slots, self.groups)

    def at(self, head: jax.Array, page: jax.Array, slot: jax.Array, group: jax.Array) -> jax.Array:
        """Where :meth:`flat` has one; int32, all broadcast together."""
        row = slot * self.groups + group
        tile = head * self.tiles + row // self.rows
        tile = tile * (self.pages // self.lanes) + page // self.lanes
        return (tile * self.rows + row % self.rows) * self.lanes + page % self.lanes
