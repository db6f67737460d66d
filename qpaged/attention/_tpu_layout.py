"""How the ``tpu`` backend reads a pool: as rows of at least 128 lanes, as TPUs store them.

A slot whose stored elements do not fill 128 lanes shares a *row* with the slots after it. The kernel never
moves elements from one lane to another: a query is repeated for each slot of a row, and zeros in the lanes of
the other slots select the slot that it is multiplied with. Codes that share a byte are extracted one at a
time: the first codes of all bytes make one array of rows, the second codes another.

Codes in two planes are the exception. Their slots fill the lanes only several times over: such a *stored row*
is taken apart into the low plane's rows, with the high bits moved to the lanes of the low ones.
"""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from qpaged.arrays import LANES
from qpaged.arrays._tpu_scales import ScaleOrder
from qpaged.attention._layout import Layout, stored_rows, stored_scales
from qpaged.pools import Pages

NN = (((1,), (0,)), ((), ()))  # [m, k] . [k, n]
NT = (((1,), (1,)), ((), ()))  # [m, k] . [n, k]
TN = (((0,), (0,)), ((), ()))  # [k, m] . [k, n]


@dataclass(frozen=True)
class TPULayout(Layout):
    """The static description of a pool, and how its rows are read outside and inside the kernel."""

    @property
    def row_width(self) -> int:
        """Stored elements of a row; of codes in two planes, those of the low one."""
        return max(LANES, self.slot_width)

    @property
    def slots_per_row(self) -> int:
        """Slots that share a row."""
        return self.row_width // self.slot_width

    @property
    def page_rows(self) -> int:
        """Rows of a page of one KV head."""
        return self.page_size // self.slots_per_row

    @property
    def decode_dtype(self) -> DTypeLike:
        """The dtype that codes decode to: the logical one if there are no scales to multiply with."""
        return jnp.float32 if self.scale_groups else self.dtype

    # Outside the kernel.

    def page_rows_of(self, pool: Pages) -> jax.Array:
        """Return a pool's codes as [kv_heads, pages, stored rows, lanes], as a cache stores them.

        Of codes in one plane these are [kv_heads, pages, page_rows, row_width].
        """
        stored = stored_rows(pool)
        slot_elements = stored.shape[2] * stored.shape[3] // self.page_size
        return stored.reshape(*stored.shape[:2], -1, math.lcm(slot_elements, LANES))

    def repeat_for_slots(self, query: jax.Array) -> jax.Array:
        """Return a query [..., head_dim] as [..., codes_per_byte, row_width], repeated for a row's slots."""
        query = query.reshape(*query.shape[:-1], self.slot_width, self.codes_per_byte).swapaxes(-1, -2)
        return jnp.tile(query, self.slots_per_row)

    def sum_over_slots(self, out: jax.Array) -> jax.Array:
        """Return an output [..., codes_per_byte, row_width] as [..., head_dim], summed over a row's slots."""
        out = out.reshape(*out.shape[:-1], self.slots_per_row, self.slot_width).sum(axis=-2)
        return out.swapaxes(-1, -2).reshape(*out.shape[:-2], self.head_dim)

    def gather_scales(
        self,
        pool: Pages,
        table: jax.Array,  # [sequences, table_pages]
        pages_per_tile: int,
    ) -> jax.Array | None:
        """Return the stored scales of the table's pages, in the table's order; None if there are no scales.

        The shape is [sequences, kv_tiles, kv_heads, ...], and its last axes are

        - [pages_per_tile] for one scale per page, [pages_per_tile, groups] for several;
        - [slots_per_row * rows] for one scale per slot, [slots_per_row * groups, rows] for several. All slots
          that are first in their row come first, then those that are second.

        Entries of the table that are no page get the scales of some page, which the kernel masks.
        """
        scales = stored_scales(pool)
        if scales is None:
            return None
        kv_heads, num_pages, _, groups = scales.shape
        page = jnp.clip(table, 0, num_pages - 1).reshape(len(table), -1, 1, pages_per_tile)
        kv_head = jnp.arange(kv_heads, dtype=jnp.int32)[:, None]
        if groups > 1 and not self.scales_per_slot:
            scales_of_page = scales.reshape(kv_heads * num_pages, groups)
            return scales_of_page.at[kv_head * num_pages + page].get(mode="promise_in_bounds")
        scales_per_row, scale_rows = 1, 1
        if self.scales_per_slot:
            scales_per_row, scale_rows = self.slots_per_row, self.page_rows
        # All indices broadcast to [sequences, kv_tiles, kv_heads, scales_per_row, groups, rows].
        page = jnp.repeat(page[..., None, None, :], scale_rows, axis=-1)
        slot = jnp.arange(pages_per_tile * scale_rows, dtype=jnp.int32) % scale_rows * scales_per_row
        slot = slot + jnp.arange(scales_per_row, dtype=jnp.int32)[:, None, None]
        group = jnp.arange(groups, dtype=jnp.int32)[:, None]
        order = ScaleOrder.of(scales)
        index = order.flat_index(kv_head[..., None, None], page, slot, group)
        gathered = order.flatten(scales).at[index].get(mode="promise_in_bounds")
        if groups == 1:
            return gathered.reshape(*gathered.shape[:3], -1)
        return gathered.reshape(*gathered.shape[:3], scales_per_row * groups, -1)

    # Inside the kernel. Rows are those of one KV head and one tile of keys or values.

    def select_slot(self, rows: jax.Array, slot_in_row: int) -> jax.Array:
        """Return ``rows`` [n, row_width] with zeros in the lanes of the other slots of each row."""
        if self.slots_per_row == 1:
            return rows
        return jnp.where(self._lane_position(rows.shape)[1] == slot_in_row, rows, jnp.zeros((), rows.dtype))

    def slot_of_element(self, num_rows: int) -> jax.Array:
        """Return the slot of each element, [num_rows, row_width], counted from the tile's first."""
        shape = num_rows, self.row_width
        return lax.broadcasted_iota(jnp.int32, shape, 0) * self.slots_per_row + self._lane_position(shape)[1]

    def decode(
        self,
        stored: jax.Array,  # [pages, stored rows, lanes]
        dtype: DTypeLike,
    ) -> list[jax.Array]:
        """Return the values [rows, row_width] in units of their scales, one array per code of a byte."""
        decoded = []
        for byte_index in range(self.codes_per_byte):
            values = self._decode_codes(stored, byte_index)
            decoded.append(values.reshape(-1, self.row_width).astype(dtype))
        return decoded

    def decode_scaled(
        self,
        stored: jax.Array,  # [pages, stored rows, lanes]
        scales: jax.Array,  # [pages, groups], or [slots_per_row * groups, rows] for scales per slot
        dtype: DTypeLike,
    ) -> list[jax.Array]:
        """Return :meth:`decode` times the scales, for formats with several scales along the channels."""
        multipliers = self.multipliers(scales)
        decoded = []
        for byte_index in range(self.codes_per_byte):
            values = self._decode_codes(stored, byte_index)
            multiplier = self._repeat_for_lanes(multipliers, byte_index)
            if self.scales_per_slot:
                values = values.reshape(-1, self.row_width)
            else:
                values = values.reshape(-1, self.page_rows, self.row_width)
                multiplier = multiplier.reshape(multiplier.shape[0], 1, self.row_width)
            decoded.append((values * multiplier).reshape(-1, self.row_width).astype(dtype))
        return decoded

    def multipliers(self, scales: jax.Array) -> jax.Array:
        """Return what stored scales multiply by, float32, with zeros for NaN and infinities.

        Tiles hold scales of pages that the sequence does not have, whose bits may mean anything. Their slots
        are masked, but a weight of 0 times NaN would be NaN. Scales that were written are finite.
        """
        return _zero_if_not_finite(self.quantizer.multiplier(scales))

    def offsets(self, scales: jax.Array) -> jax.Array:
        """Return the offsets that stored scales carry, float32; zeros likewise."""
        return _zero_if_not_finite(self.quantizer.offset.from_scales(scales))

    def lane_offsets(
        self,
        scales: jax.Array,  # [pages, groups]
        byte_index: int,
    ) -> jax.Array:
        """Return the offset of every lane's channel, [pages, row_width]."""
        return self._repeat_for_lanes(self.offsets(scales), byte_index)

    def page_of_row(self, pages_per_tile: int) -> jax.Array:
        """Return the one-hot matrix [pages, rows] with 1 where the row is of the page, float32."""
        shape = pages_per_tile, pages_per_tile * self.page_rows
        page = lax.div(lax.broadcasted_iota(jnp.int32, shape, 1), self.page_rows)
        return (page == lax.broadcasted_iota(jnp.int32, shape, 0)).astype(jnp.float32)

    def _decode_codes(self, stored: jax.Array, byte_index: int) -> jax.Array:
        if self.quantizer is None:
            return stored.astype(jnp.float32)
        codes = self.codes(stored, byte_index)
        return self.quantizer.decode(codes, self.decode_dtype).astype(jnp.float32)

    def _repeat_for_lanes(
        self,
        per_group: jax.Array,  # [pages, groups], or [slots_per_row * groups, rows] for scales per slot
        byte_index: int,
    ) -> jax.Array:
        """Return the entry of every lane's channel, [pages or rows, row_width]."""
        if self.scale_groups == self.row_width and self.codes_per_byte == 1 and not self.scales_per_slot:
            return per_group
        entries = self.scale_groups
        if self.scales_per_slot:
            entries *= self.slots_per_row
        shape = entries, self.row_width
        element, slot_in_row = self._lane_position(shape)
        channel = element * self.codes_per_byte + byte_index
        group = lax.div(channel * self.scale_groups, self.head_dim)
        if self.scales_per_slot:
            group = group + slot_in_row * self.scale_groups
        # A dot product with a one-hot matrix, because a TPU cannot gather along lanes. In the highest
        # precision it is exact.
        one_hot = (lax.broadcasted_iota(jnp.int32, shape, 0) == group).astype(jnp.float32)
        numbers = TN if self.scales_per_slot else NN
        return lax.dot_general(per_group, one_hot, numbers, precision=lax.Precision.HIGHEST)

    def _lane_position(self, shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
        """Return each lane's element within its slot, and its slot within the row."""
        lane = lax.broadcasted_iota(jnp.int32, shape, 1)
        return lax.rem(lane, self.slot_width), lax.div(lane, self.slot_width)


def _zero_if_not_finite(x: jax.Array) -> jax.Array:
    return jnp.where(jnp.abs(x) < jnp.inf, x, 0.0)


def dot(lhs: jax.Array, rhs: jax.Array, dimension_numbers: Any) -> jax.Array:
    """Return a dot product in float32, in the highest precision if the operands are float32."""
    precision = lax.Precision.HIGHEST if lhs.dtype == jnp.float32 else None
    return lax.dot_general(
        lhs, rhs, dimension_numbers, precision=precision, preferred_element_type=jnp.float32
    )
