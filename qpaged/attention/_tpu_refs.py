"""What the kernel of the ``tpu`` backend works on: the static call, and references to HBM, VMEM and SMEM.

Shapes: a *row* holds ``row_width`` lanes and the codes of one or more slots, and may be part of a stored row
(see ``_tpu_layout``). ``q_rows`` are the query rows that one KV head serves in a query tile, and ``rows`` are
the rows of one head in a tile of keys or of values.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike

from qpaged.attention._options import Options
from qpaged.attention._tpu_layout import NN, TPULayout, dot

Ref = Any  # an array in some memory; the type that JAX gives it does not say that it can be indexed
Index = jax.Array | int
Spec = Any  # a memory space with a shape and a dtype, which becomes a Ref in the kernel


@dataclass(frozen=True)
class TPUCall:
    """The static description of one call.

    Attributes:
        keys: how the pages of keys lie.
        values: how the pages of values lie.
        options: the options of the attention.
        num_q_tiles: query tiles, each a step of the grid.
        q_tile: queries of a query tile.
        q_heads_per_kv: query heads of a KV head.
        pages_per_tile: pages of a tile of keys and values.
        table_pages: entries of a row of the page table, a multiple of ``pages_per_tile``.
        tiles_per_run: query tiles that read one row of the page table, one after another.
    """

    keys: TPULayout
    values: TPULayout
    options: Options
    num_q_tiles: int
    q_tile: int
    q_heads_per_kv: int
    pages_per_tile: int
    table_pages: int
    tiles_per_run: int

    @property
    def q_rows(self) -> int:
        """Query rows that one KV head serves in a query tile."""
        return self.q_tile * self.q_heads_per_kv

    @property
    def kv_tile(self) -> int:
        """Slots of a tile of keys and values."""
        return self.pages_per_tile * self.keys.page_size

    @property
    def may_have_gaps(self) -> bool:
        """True if a query tile may see slots on both sides of slots that it does not see."""
        return self.q_tile > 1 and self.options.sliding_window is not None


class HBMPool(NamedTuple):
    """Keys or values in HBM.

    Attributes:
        pages: [kv_heads, num_pages, stored rows, lanes], codes or floats.
        scales: [sequences, kv_tiles, ...] as :meth:`TPULayout.gather_scales` returns them; None if there are
            none.
    """

    pages: Ref
    scales: Ref


class Buffers(NamedTuple):
    """Keys or values in VMEM: two tiles as they are stored, and what is computed from one of them.

    Attributes:
        pages: [2, pages_per_tile, kv_heads, stored rows, lanes].
        scales: [2, ...], the scales of a tile; None if there are none.
        semaphores: [2], for the copies into either buffer.
        multipliers: [kv_heads, slots] float32, the multiplier of each slot in the order of
            :meth:`TPULayout.gather_scales`, or [kv_heads, rows] if the slots of a page share it; None if
            there are several along the channels, or no scales.
        offsets: what is added to each slot, in the shape of ``multipliers``; None if there are no offsets.
        visible: [rows, row_width] float32, 1 where any query of the query tile sees the slot; None if all
            slots between the first visible one and the last are visible.
    """

    pages: Ref
    scales: Ref
    semaphores: Ref
    multipliers: Ref
    offsets: Ref
    visible: Ref

    @classmethod
    def specs(cls, call: TPUCall, layout: TPULayout, pool: HBMPool) -> "Buffers":
        """Return the memory that the buffers of a pool take."""
        kv_heads, _, *page_shape = pool.pages.shape
        rows = call.kv_tile // layout.slots_per_row
        scales: Spec = None
        if pool.scales is not None:
            scales = pltpu.VMEM((2, *pool.scales.shape[2:]), pool.scales.dtype)
        multipliers: Spec = None
        offsets: Spec = None
        if layout.scale_groups == 1:
            slots = call.kv_tile if layout.scales_per_slot else rows
            multipliers = pltpu.VMEM((kv_heads, slots), jnp.float32)
            if layout.has_offset:
                offsets = pltpu.VMEM((kv_heads, slots), jnp.float32)
        visible: Spec = None
        if call.may_have_gaps:
            visible = pltpu.VMEM((rows, layout.row_width), jnp.float32)
        return cls(
            pages=pltpu.VMEM((2, call.pages_per_tile, kv_heads, *page_shape), pool.pages.dtype),
            scales=scales,
            semaphores=pltpu.SemaphoreType.DMA((2,)),
            multipliers=multipliers,
            offsets=offsets,
            visible=visible,
        )


class State(NamedTuple):
    """The online softmax of a query tile, over the tiles of keys and values so far.

    Attributes:
        row_max: [kv_heads, q_rows, 1] float32, the highest score of each query row.
        row_sum: [kv_heads, q_rows, 1] float32, the sum of the weights.
        acc: [kv_heads, codes_per_byte, q_rows, row_width] float32, the sum of the weighted values.
        position: [q_rows, 1] int32, the position of each query row, which stays the same.
        tiles_done: [1] int32 in SMEM, the tiles of keys and values of all query tiles so far. Its parity says
            which buffer is computed with.
    """

    row_max: Ref
    row_sum: Ref
    acc: Ref
    position: Ref
    tiles_done: Ref

    @classmethod
    def specs(cls, call: TPUCall, kv_heads: int) -> "State":
        """Return the memory that the state takes."""
        acc_shape = kv_heads, call.values.codes_per_byte, call.q_rows, call.values.row_width
        return cls(
            row_max=pltpu.VMEM((kv_heads, call.q_rows, 1), jnp.float32),
            row_sum=pltpu.VMEM((kv_heads, call.q_rows, 1), jnp.float32),
            acc=pltpu.VMEM(acc_shape, jnp.float32),
            position=pltpu.VMEM((call.q_rows, 1), jnp.int32),
            tiles_done=pltpu.SMEM((1,), jnp.int32),
        )


@dataclass(frozen=True)
class KVRefs:
    """Keys or values within the kernel: their layout, the references to HBM and those to the buffers."""

    layout: TPULayout
    pool: HBMPool
    buffers: Buffers

    def page_copy(self, page: jax.Array, buffer_index: Index, page_index: jax.Array) -> Any:
        """Return the copy of a page, all KV heads of it, to a buffer as page ``page_index`` of the tile."""
        source = self.pool.pages.at[:, page]
        target = self.buffers.pages.at[buffer_index, page_index]
        return pltpu.make_async_copy(source, target, self.buffers.semaphores.at[buffer_index])

    def scale_copy(self, sequence: Index, kv_tile: jax.Array, buffer_index: Index) -> Any:
        """Return the copy of a tile's scales to a buffer."""
        source = self.pool.scales.at[sequence, kv_tile]
        target = self.buffers.scales.at[buffer_index]
        return pltpu.make_async_copy(source, target, self.buffers.semaphores.at[buffer_index])

    def compute_multipliers(self, call: TPUCall, buffer_index: jax.Array) -> None:
        """Compute the multipliers and the offsets of a tile's slots, if each slot has one."""
        if self.buffers.multipliers is not None:
            multipliers = self.layout.multipliers(self.buffers.scales[buffer_index])
            self.buffers.multipliers[...] = self._repeat_for_rows(call, multipliers)
        if self.buffers.offsets is not None:
            offsets = self.layout.offsets(self.buffers.scales[buffer_index])
            self.buffers.offsets[...] = self._repeat_for_rows(call, offsets)

    def _repeat_for_rows(self, call: TPUCall, per_page: jax.Array) -> jax.Array:
        """Return [kv_heads, pages] as [kv_heads, rows]; what is per slot stays as it is."""
        if self.layout.scales_per_slot:
            return per_page
        return dot(per_page, self.layout.page_of_row(call.pages_per_tile), NN)

    def of_slot_in_row(self, per_slot: Ref, head: jax.Array, slot_in_row: int) -> jax.Array:
        """Return a head's multipliers or offsets, [1, rows], for one of the slots of each row."""
        if not self.layout.scales_per_slot:
            return per_slot[pl.ds(head, 1)]
        rows = per_slot.shape[1] // self.layout.slots_per_row
        return per_slot[pl.ds(head, 1)][:, slot_in_row * rows : (slot_in_row + 1) * rows]

    def load(
        self,
        buffer_index: jax.Array,
        head: jax.Array,
        dtype: DTypeLike,
        mask: jax.Array | None,  # [rows, row_width]
    ) -> tuple[list[jax.Array], jax.Array | None]:
        """Return a head's keys or values [rows, row_width], one array per code of a byte, and their scales.

        Several scales along the channels are multiplied in, and returned as they are stored. Other scales are
        left to the caller, and None is returned. Masked elements are zeros.
        """
        stored = self.buffers.pages[buffer_index, :, head]
        # The mask is made of 32-bit lanes, and selects among 32-bit values.
        decode_dtype = dtype if mask is None else jnp.float32
        group_scales = None
        if self.layout.scale_groups > 1:
            group_scales = self.buffers.scales[buffer_index, head]
            decoded = self.layout.decode_scaled(stored, group_scales, decode_dtype)
        else:
            decoded = self.layout.decode(stored, decode_dtype)
        if mask is not None:
            decoded = [jnp.where(mask, rows, 0.0).astype(dtype) for rows in decoded]
        return decoded, group_scales


@dataclass(frozen=True)
class Refs:
    """What the functions of the kernel share for one query tile.

    Attributes:
        call: the static description of the call.
        q_tile_index: the query tile.
        visible_range: [2 * num_q_tiles] int32 in SMEM; the first and the last slot that any query of
            each query tile sees.
        position: [num_q_tiles * q_tile] int32 in SMEM.
        table: [sequences * table_pages] int32 in SMEM.
        query: [1, kv_heads, codes_per_byte, q_rows, row_width].
        keys: the keys.
        values: the values.
        state: the online softmax.
    """

    call: TPUCall
    q_tile_index: jax.Array
    visible_range: Ref
    position: Ref
    table: Ref
    query: Ref
    keys: KVRefs
    values: KVRefs
    state: State

    def first_visible(self, q_tile_index: jax.Array) -> jax.Array:
        """Return the first slot that any query of a query tile sees."""
        return self.visible_range[2 * q_tile_index]

    def last_visible(self, q_tile_index: jax.Array) -> jax.Array:
        """Return the last slot that any query of a query tile sees."""
        return self.visible_range[2 * q_tile_index + 1]

    def sequence(self, q_tile_index: jax.Array) -> Index:
        """Return the row of the page table that a query tile reads."""
        if self.call.tiles_per_run == self.call.num_q_tiles:
            return 0
        return lax.div(q_tile_index, jnp.int32(self.call.tiles_per_run))


@dataclass(frozen=True)
class KVTile:
    """The tile of keys and values that is computed with.

    Attributes:
        index: the tile's number, counted from the sequence's first.
        buffer_index: the buffer that the tile was copied to.
        copied: [1, rows] of keys, True where the row's page was copied.
        first_visible: the first slot that any query of the query tile sees.
        last_visible: the last one.
    """

    index: jax.Array
    buffer_index: jax.Array
    copied: jax.Array
    first_visible: jax.Array
    last_visible: jax.Array
