"""The scales of slots, one by one, in the order in which TPUs keep them.

A TPU keeps the pages of scales (kv_heads, pages, page_size, groups) along its lanes, in tiles of 128 by as
many groups, or slots, as it packs together. For scales that are read or written in another order, or in
longer slices, XLA would bring the whole pool's into that one first, at each call.
"""

from dataclasses import dataclass

import jax

from qpaged.arrays._lane_rows import LANES

TILE_ROWS = 8


@dataclass(frozen=True)
class ScaleOrder:
    """The order of scales (heads, pages, slots, groups) in tiles of ``tile_rows`` groups, or slots, and
    ``tile_lanes`` pages."""

    heads: int
    pages: int
    slots: int
    groups: int
    tile_rows: int
    tile_lanes: int

    @classmethod
    def of(cls, scales: jax.Array) -> "ScaleOrder":
        heads, pages, slots, groups = scales.shape
        if pages % LANES:  # XLA does not tile the pages: any order will do
            return cls(heads, pages, slots, groups, tile_rows=1, tile_lanes=pages)
        rows = 1
        if groups > 1:
            rows = groups
        elif scales.dtype.itemsize < 4:  # narrow scales are packed along the slots
            rows = slots
        tile_rows = TILE_ROWS if rows % TILE_ROWS == 0 else rows
        return cls(heads, pages, slots, groups, tile_rows=tile_rows, tile_lanes=LANES)

    @property
    def tiles_per_page(self) -> int:
        """Tiles that hold the slots and groups of a page."""
        return self.slots * self.groups // self.tile_rows

    def flatten(self, scales: jax.Array) -> jax.Array:
        """Return all the scales as (heads * pages * slots * groups,), in this order."""
        shape = self.heads, -1, self.tile_lanes, self.tiles_per_page, self.tile_rows
        return scales.reshape(shape).transpose(0, 3, 1, 4, 2).reshape(-1)

    def unflatten(self, flat: jax.Array) -> jax.Array:
        """Return (heads, pages, slots, groups) of what :meth:`flatten` made."""
        tiles = flat.reshape(self.heads, self.tiles_per_page, -1, self.tile_rows, self.tile_lanes)
        return tiles.transpose(0, 2, 4, 1, 3).reshape(self.heads, self.pages, self.slots, self.groups)

    def flat_index(self, head: jax.Array, page: jax.Array, slot: jax.Array, group: jax.Array) -> jax.Array:
        """Return the index of scales in :meth:`flatten`; int32, all broadcast together."""
        row = slot * self.groups + group
        tile = head * self.tiles_per_page + row // self.tile_rows
        tile = tile * (self.pages // self.tile_lanes) + page // self.tile_lanes
        return (tile * self.tile_rows + row % self.tile_rows) * self.tile_lanes + page % self.tile_lanes
