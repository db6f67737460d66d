"""The Pallas kernel of the ``tpu`` backend: one query tile after another, each over tiles of keys and values.

The pages of a tile are copied from HBM one by one, as the page table in scalar memory says, all KV heads of a
page at once. Two buffers alternate: a tile is copied into one while the tile before is computed with from the
other. The first tile of the next query tile is copied during the last one of this query tile. The softmax is an
online one (Milakov and Gimelshein, 2018).

Shapes: a *row* holds ``row_width`` lanes and the codes of one or more slots (see ``_tpu_layout``). ``q_rows`` are
the query rows that one KV head serves in a query tile, and ``rows`` are the rows of one head in a tile of keys
or of values.
"""

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike

from qpaged._compat import shaped_as
from qpaged.attention._options import MASK_VALUE, Options
from qpaged.attention._tpu_layout import TPULayout

NT = (((1,), (1,)), ((), ()))  # [m, k] . [n, k]
NN = (((1,), (0,)), ((), ()))  # [m, k] . [k, n]

Ref = Any  # what Pallas gives for an array in a memory; its own type does not say that it can be indexed
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
        one_sequence: True if all query tiles are of one sequence, the page table's only row.
    """

    keys: TPULayout
    values: TPULayout
    options: Options
    num_q_tiles: int
    q_tile: int
    q_heads_per_kv: int
    pages_per_tile: int
    table_pages: int
    one_sequence: bool

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


class Pool(NamedTuple):
    """Keys or values in HBM.

    Attributes:
        pages: [kv_heads, num_pages, page_rows, row_width], codes or floats.
        scales: [sequences, kv_tiles, ...] as :meth:`TPULayout.gather_scales` returns them; None if there are
            none.
    """

    pages: Any
    scales: Any


class Buffers(NamedTuple):
    """Keys or values on the chip: two tiles as they are stored, and what is computed from one of them.

    Attributes:
        pages: [2, pages_per_tile, kv_heads, page_rows, row_width].
        scales: [2, ...], the scales of a tile; None if there are none.
        semaphores: [2], for the copies into either buffer.
        multipliers: [kv_heads, slots] float32, the multiplier of each slot; None unless a slot has one. Scales
            per slot come in the order of :meth:`TPULayout.gather_scales`; scales per page are repeated for
            [kv_heads, rows].
        offsets: likewise, what is added to each slot; None if the format has no offsets.
        visible: [rows, row_width] float32, 1 where any query of the query tile sees the slot; None if the first
            and the last visible slot say that.
    """

    pages: Any
    scales: Any
    semaphores: Any
    multipliers: Any
    offsets: Any
    visible: Any

    @classmethod
    def specs(cls, call: TPUCall, layout: TPULayout, pool: Pool) -> "Buffers":
        """Return the memory that the buffers of a pool take."""
        kv_heads, _, page_rows, row_width = pool.pages.shape
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
            visible = pltpu.VMEM((rows, row_width), jnp.float32)
        return cls(
            pages=pltpu.VMEM((2, call.pages_per_tile, kv_heads, page_rows, row_width), pool.pages.dtype),
            scales=scales,
            semaphores=pltpu.SemaphoreType.DMA((2,)),
            multipliers=multipliers,
            offsets=offsets,
            visible=visible,
        )


class State(NamedTuple):
    """The online softmax of a query tile over the slots so far, and what else lasts longer than a tile.

    Attributes:
        row_max: [kv_heads, q_rows, 1] float32, the highest score of each query row.
        row_sum: [kv_heads, q_rows, 1] float32, the sum of its weights.
        acc: [kv_heads, codes_per_byte, q_rows, row_width] float32, the sum of its weighted values.
        position: [q_rows, 1] int32, the position of each query row.
        tiles_done: [1] int32 in scalar memory, tiles of keys and values since the kernel began.
    """

    row_max: Any
    row_sum: Any
    acc: Any
    position: Any
    tiles_done: Any

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
    pool: Pool
    buffers: Buffers

    def page_copy(self, page: jax.Array, buffer_index: Index, page_index: jax.Array) -> Any:
        """Return the copy of one page, all KV heads of it, to place ``page_index`` of a buffer."""
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
        return _dot(per_page, self.layout.page_of_row(call.pages_per_tile), NN)

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
        """Return a head's keys or values [rows, row_width], one array per code of a byte, zeros where masked.

        Several scales along the channels are multiplied in, and returned as they are stored. Other scales are
        left to the caller, and None is returned.
        """
        stored = self.buffers.pages[buffer_index, :, head]
        # A mask of 32-bit lanes selects among 32-bit values.
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
        visible_range: [2 * num_q_tiles] int32 in scalar memory; the first and the last slot that any query of
            each query tile sees.
        position: [num_q_tiles * q_tile] int32 in scalar memory.
        table: [sequences * table_pages] int32 in scalar memory.
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
        return 0 if self.call.one_sequence else q_tile_index


class KVTile(NamedTuple):
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


def attend(
    call: TPUCall,
    visible_range: jax.Array,  # [2 * num_q_tiles] int32, first and last visible slot; 0 and -1 if there is none
    position: jax.Array,  # [num_q_tiles * q_tile] int32
    table: jax.Array,  # [sequences * table_pages] int32
    query: jax.Array,  # [num_q_tiles, kv_heads, codes_per_byte, q_rows, row_width]
    sinks: jax.Array | None,  # [kv_heads, q_rows, 1] float32
    keys: Pool,
    values: Pool,
) -> jax.Array:
    """Return the attention of all query tiles, [num_q_tiles, kv_heads, codes_per_byte, q_rows, row_width] float32.

    The lanes of each slot of a row hold the sum over the slots at that place; their sum is the attention.
    """
    kv_heads = keys.pages.shape[0]
    out_shape = (
        call.num_q_tiles, kv_heads, call.values.codes_per_byte, call.q_rows, call.values.row_width,
    )  # fmt: skip
    buffers = Buffers.specs(call, call.keys, keys), Buffers.specs(call, call.values, values)
    inputs = query, sinks, (keys, values)
    return pl.pallas_call(
        functools.partial(_kernel, call),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(call.num_q_tiles,),
            in_specs=(_per_q_tile(query.shape), _same_for_all(sinks), _in_hbm((keys, values))),
            out_specs=_per_q_tile(out_shape),
            scratch_shapes=(buffers, State.specs(call, kv_heads)),
        ),
        out_shape=shaped_as(out_shape, jnp.float32, (visible_range, position, table, inputs)),
        name="paged_attention",
    )(visible_range, position, table, *inputs)


def _per_q_tile(shape: tuple[int, ...]) -> pl.BlockSpec:
    """Return the specification of an array whose first axis is the query tiles'."""

    def block_index(q_tile_index: jax.Array, *_: Ref) -> tuple[Index, ...]:
        return q_tile_index, *[0] * (len(shape) - 1)

    return pl.BlockSpec((1, *shape[1:]), block_index)


def _same_for_all(array: jax.Array | None) -> pl.BlockSpec | None:
    """Return the specification of an array that all query tiles read, if there is one."""
    if array is None:
        return None
    ndim = array.ndim
    return pl.BlockSpec(array.shape, lambda *_: (0,) * ndim)


def _in_hbm(pools: tuple[Pool, Pool]) -> Any:
    """Return the specifications of arrays that the kernel copies from by itself."""
    return jax.tree_util.tree_map(lambda _: pl.BlockSpec(memory_space=pl.ANY), pools)


def _kernel(
    call: TPUCall,
    visible_range_ref: Ref,  # [2 * num_q_tiles]
    position_ref: Ref,  # [num_q_tiles * q_tile]
    table_ref: Ref,  # [sequences * table_pages]
    query_ref: Ref,  # [1, kv_heads, codes_per_byte, q_rows, row_width]
    sinks_ref: Ref | None,  # [kv_heads, q_rows, 1]
    pools: tuple[Pool, Pool],
    out_ref: Ref,  # [1, kv_heads, codes_per_byte, q_rows, row_width]
    buffers: tuple[Buffers, Buffers],
    state: State,
) -> None:
    """Attend one query tile to all tiles of keys and values that it sees."""
    keys = KVRefs(call.keys, pools[0], buffers[0])
    values = KVRefs(call.values, pools[1], buffers[1])
    q_tile_index = pl.program_id(0)
    refs = Refs(
        call, q_tile_index, visible_range_ref, position_ref, table_ref, query_ref, keys, values, state
    )
    first, end = _visible_kv_tiles(refs, q_tile_index)

    @pl.when(q_tile_index == 0)
    def start_first_copies() -> None:
        state.tiles_done[0] = 0
        _start_copies(refs, q_tile_index, first, 0)

    _initialize_state(refs, sinks_ref)

    def attend_kv_tile(kv_tile_index: jax.Array, _: None) -> None:
        buffer_index = lax.rem(state.tiles_done[0], 2)
        _start_next_copies(refs, kv_tile_index, end, buffer_index)
        _wait_for_copies(refs, kv_tile_index, buffer_index)
        for side in (keys, values):
            side.compute_multipliers(call, buffer_index)
            _mark_visible(refs, side, kv_tile_index)
        tile = KVTile(
            index=kv_tile_index,
            buffer_index=buffer_index,
            copied=_copied_rows(refs, kv_tile_index),
            first_visible=refs.first_visible(q_tile_index),
            last_visible=refs.last_visible(q_tile_index),
        )
        lax.fori_loop(0, state.row_max.shape[0], lambda head, _: _attend_head(refs, tile, head), None)
        state.tiles_done[0] += 1

    lax.fori_loop(first, end, attend_kv_tile, None)
    total = jnp.where(state.row_sum[...] > 0, state.row_sum[...], 1)
    out_ref[0] = state.acc[...] / total[:, None]


def _visible_kv_tiles(refs: Refs, q_tile_index: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the first tile of keys and values that a query tile sees, and one past the last; at least one."""
    kv_tile = refs.call.kv_tile
    first = lax.div(refs.first_visible(q_tile_index), kv_tile)
    return first, jnp.maximum(lax.div(refs.last_visible(q_tile_index), kv_tile), first) + 1


def _initialize_state(refs: Refs, sinks_ref: Ref | None) -> None:
    """Set the state before the first slot: only the sinks, whose weights are exp(0) = 1."""
    call, state = refs.call, refs.state
    row = lax.broadcasted_iota(jnp.int32, (call.q_rows, 1), 0)
    state.position[...] = _load_positions(refs, lax.div(row, call.q_heads_per_kv))
    state.acc[...] = jnp.zeros(state.acc.shape, jnp.float32)
    if sinks_ref is None:
        state.row_max[...] = jnp.full(state.row_max.shape, MASK_VALUE, jnp.float32)
        state.row_sum[...] = jnp.zeros(state.row_sum.shape, jnp.float32)
    else:
        state.row_max[...] = sinks_ref[...]
        state.row_sum[...] = jnp.ones(state.row_sum.shape, jnp.float32)


def _load_positions(refs: Refs, query_index: jax.Array) -> jax.Array:
    """Return the positions of queries of this query tile, in the shape of ``query_index``."""
    q_tile = refs.call.q_tile
    first = pl.program_id(0) * q_tile

    # Scalar memory is read one number at a time.
    def load_position(index: jax.Array, positions: jax.Array) -> jax.Array:
        return jnp.where(query_index == index, refs.position[first + index], positions)

    return lax.fori_loop(0, q_tile, load_position, jnp.full(query_index.shape, -1, jnp.int32))


def _physical_page(
    refs: Refs, q_tile_index: jax.Array, logical_page: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Return a sequence's page in the pool, and True if there is one and any query of the query tile sees it."""
    call = refs.call
    page = refs.table[refs.sequence(q_tile_index) * call.table_pages + logical_page]
    page_size = call.keys.page_size
    visible = logical_page >= lax.div(refs.first_visible(q_tile_index), page_size)
    visible &= logical_page * page_size <= refs.last_visible(q_tile_index)
    return page, visible & (page >= 0) & (page < call.options.num_pages)


def _start_copies(refs: Refs, q_tile_index: jax.Array, kv_tile_index: jax.Array, buffer_index: Index) -> None:
    """Start the copies of a tile of keys and values. Values that are not copied become zeros."""
    call, keys, values = refs.call, refs.keys, refs.values
    for side in (keys, values):
        if side.pool.scales is not None:
            side.scale_copy(refs.sequence(q_tile_index), kv_tile_index, buffer_index).start()

    def start_page(page_index: jax.Array, _: None) -> None:
        logical_page = kv_tile_index * call.pages_per_tile + page_index
        page, is_copied = _physical_page(refs, q_tile_index, logical_page)

        @pl.when(is_copied)
        def start() -> None:
            keys.page_copy(page, buffer_index, page_index).start()
            values.page_copy(page, buffer_index, page_index).start()

        # What the buffer held before may be NaN, which a weight of zero would not hide.
        @pl.when(jnp.logical_not(is_copied))
        def clear() -> None:
            pages = values.buffers.pages
            pages[buffer_index, page_index] = jnp.zeros(pages.shape[2:], pages.dtype)

    lax.fori_loop(0, call.pages_per_tile, start_page, None)


def _start_next_copies(refs: Refs, kv_tile_index: jax.Array, end: jax.Array, buffer_index: jax.Array) -> None:
    """Start the copies of the tile after this one, to the other buffer.

    After the last tile of a query tile comes the first one of the next query tile.
    """
    same_q_tile = kv_tile_index + 1 < end
    following = jnp.minimum(refs.q_tile_index + 1, refs.call.num_q_tiles - 1)
    q_tile_index = jnp.where(same_q_tile, refs.q_tile_index, following)
    next_tile = jnp.where(same_q_tile, kv_tile_index + 1, _visible_kv_tiles(refs, q_tile_index)[0])

    @pl.when(same_q_tile | (refs.q_tile_index + 1 < refs.call.num_q_tiles))
    def start() -> None:
        _start_copies(refs, q_tile_index, next_tile, 1 - buffer_index)


def _wait_for_copies(refs: Refs, kv_tile_index: jax.Array, buffer_index: jax.Array) -> None:
    """Wait for the copies that :func:`_start_copies` started for a tile of this query tile."""
    call, keys, values = refs.call, refs.keys, refs.values
    for side in (keys, values):
        if side.pool.scales is not None:
            side.scale_copy(refs.sequence(refs.q_tile_index), kv_tile_index, buffer_index).wait()

    def wait_for_page(page_index: jax.Array, _: None) -> None:
        logical_page = kv_tile_index * call.pages_per_tile + page_index
        page, is_copied = _physical_page(refs, refs.q_tile_index, logical_page)

        @pl.when(is_copied)
        def wait() -> None:
            keys.page_copy(page, buffer_index, page_index).wait()
            values.page_copy(page, buffer_index, page_index).wait()

    lax.fori_loop(0, call.pages_per_tile, wait_for_page, None)


def _copied_rows(refs: Refs, kv_tile_index: jax.Array) -> jax.Array:
    """Return [1, rows] of keys, True where the row's page was copied."""
    call = refs.call
    shape = 1, call.pages_per_tile * call.keys.page_rows
    page_of_row = lax.div(lax.broadcasted_iota(jnp.int32, shape, 1), call.keys.page_rows)

    def mark_page(page_index: jax.Array, copied: jax.Array) -> jax.Array:
        logical_page = kv_tile_index * call.pages_per_tile + page_index
        _, is_copied = _physical_page(refs, refs.q_tile_index, logical_page)
        return jnp.where(page_of_row == page_index, is_copied.astype(jnp.int32), copied)

    return lax.fori_loop(0, call.pages_per_tile, mark_page, jnp.zeros(shape, jnp.int32)) > 0


def _mark_visible(refs: Refs, side: KVRefs, kv_tile_index: jax.Array) -> None:
    """Fill the buffer ``visible`` for a tile, if there is one."""
    visible_ref, layout, call = side.buffers.visible, side.layout, refs.call
    if visible_ref is None:
        return
    query_index = lax.broadcasted_iota(jnp.int32, (1, call.q_tile), 1)
    position = _load_positions(refs, query_index)
    row = lax.broadcasted_iota(jnp.int32, (len(visible_ref), 1), 0)
    visible = jnp.zeros(visible_ref.shape, jnp.float32)
    for slot_in_row in range(layout.slots_per_row):
        slot = kv_tile_index * call.kv_tile + row * layout.slots_per_row + slot_in_row
        mask = jnp.where(call.options.position_mask(position, slot), 1.0, 0.0)  # [rows, q_tile]
        any_query = jnp.broadcast_to(mask.max(axis=1, keepdims=True), visible_ref.shape)
        visible += layout.select_slot(any_query, slot_in_row)
    visible_ref[...] = visible


def _visible_elements(refs: Refs, side: KVRefs, tile: KVTile) -> jax.Array:
    """Return [rows, row_width], True for the elements of slots that any query of the query tile sees.

    The elements of other slots may be NaN, and zero times NaN is NaN.
    """
    if side.buffers.visible is not None:
        return side.buffers.visible[...] > 0
    num_rows = refs.call.kv_tile // side.layout.slots_per_row
    slot = tile.index * refs.call.kv_tile + side.layout.slot_of_element(num_rows)
    return (slot >= tile.first_visible) & (slot <= tile.last_visible)


def _attend_head(refs: Refs, tile: KVTile, head: jax.Array) -> None:
    """Add a tile of keys and values to the online softmax of one KV head."""
    state = refs.state
    scores = _scores(refs, tile, head)
    masks = _attention_masks(refs, tile, scores)

    m_prev = m_next = state.row_max[head]  # [q_rows, 1]
    for s, mask in zip(scores, masks, strict=True):
        m_next = jnp.maximum(m_next, jnp.where(mask, s, MASK_VALUE).max(axis=1, keepdims=True))
    alpha = jnp.exp(m_prev - m_next)
    weights = []
    for s, mask in zip(scores, masks, strict=True):
        weights.append(jnp.where(mask, jnp.exp(s - m_next), 0.0).astype(refs.query.dtype))
    state.row_max[head] = m_next
    # The sum is of the rounded weights, which the dot product with the values uses.
    tile_sum = _sum(w.astype(jnp.float32).sum(axis=1, keepdims=True) for w in weights)
    l_prev = state.row_sum[head]
    state.row_sum[head] = l_prev * alpha + tile_sum
    for byte_index, weighted in enumerate(_weighted_values(refs, tile, head, weights)):
        state.acc[head, byte_index] = state.acc[head, byte_index] * alpha + weighted


def _attention_masks(refs: Refs, tile: KVTile, scores: list[jax.Array]) -> list[jax.Array]:
    """Return a mask [q_rows, rows] for each of the ``scores``, which are those of the slots of each row."""
    call = refs.call
    masks = []
    for slot_in_row in range(call.keys.slots_per_row):
        row = lax.broadcasted_iota(jnp.int32, scores[slot_in_row].shape, 1)
        slot_in_tile = row * call.keys.slots_per_row + slot_in_row
        position = refs.state.position[...]
        slot = tile.index * call.kv_tile + slot_in_tile
        masks.append(call.options.position_mask(position, slot) & tile.copied)
    return masks


def _scores(refs: Refs, tile: KVTile, head: jax.Array) -> list[jax.Array]:
    """Return a head's scores, an array [q_rows, rows] for each slot in a row."""
    keys, layout = refs.keys, refs.keys.layout
    key_mask = None
    if layout.slots_per_row > 1:
        # The dot product with one slot of a row multiplies the others by zero: they must not be NaN.
        key_mask = _visible_elements(refs, keys, tile)
    k, group_scales = keys.load(tile.buffer_index, head, refs.query.dtype, key_mask)
    q = [refs.query[0, head, byte_index] for byte_index in range(layout.codes_per_byte)]
    group_offsets = None
    if group_scales is not None and layout.has_offset:
        group_offsets = _query_dot_group_offsets(refs.call, q, group_scales)
    scores = []
    for slot_in_row in range(layout.slots_per_row):
        q_slot = [layout.select_slot(part, slot_in_row) for part in q]
        dots = _sum(_dot(part, rows, NT) for part, rows in zip(q_slot, k, strict=True))
        if keys.buffers.multipliers is not None:
            dots = dots * keys.of_slot_in_row(keys.buffers.multipliers, head, slot_in_row)
        if keys.buffers.offsets is not None:
            # q . (k + offset) = q . k + sum(q) * offset
            q_sum = _sum(part.astype(jnp.float32).sum(axis=1, keepdims=True) for part in q_slot)
            dots = dots + q_sum * keys.of_slot_in_row(keys.buffers.offsets, head, slot_in_row)
        if group_offsets is not None:
            dots = dots + group_offsets
        scores.append(refs.call.options.scale_and_cap(dots))
    return scores


def _query_dot_group_offsets(
    call: TPUCall,
    q: list[jax.Array],  # [q_rows, row_width] per code of a byte
    scales: jax.Array,  # [pages, groups]
) -> jax.Array:
    """Return the dot products of a query with the offsets of each row's page, [q_rows, rows].

    The slots of a row are of one page and share its offsets, so that the dot product with one of them is enough.
    """
    layout = call.keys
    per_page = _sum(
        _dot(layout.select_slot(part, 0).astype(jnp.float32), layout.lane_offsets(scales, byte_index), NT)
        for byte_index, part in enumerate(q)
    )
    return _dot(per_page, layout.page_of_row(call.pages_per_tile), NN)


def _weighted_values(
    refs: Refs,
    tile: KVTile,
    head: jax.Array,
    weights: list[jax.Array],  # [q_rows, rows of keys] for each slot in a row of keys
) -> list[jax.Array]:
    """Return a head's values times their weights, an array [q_rows, row_width] per code of a byte."""
    values, layout, dtype = refs.values, refs.values.layout, refs.query.dtype
    weights = _regroup_weights(refs.call, weights)
    value_mask = _visible_elements(refs, values, tile)
    v, group_scales = values.load(tile.buffer_index, head, dtype, value_mask)
    total = [jnp.zeros((refs.call.q_rows, layout.row_width), jnp.float32) for _ in v]
    for slot_in_row, w in enumerate(weights):
        w_float32 = w.astype(jnp.float32)
        if values.buffers.multipliers is not None:
            multipliers = values.of_slot_in_row(values.buffers.multipliers, head, slot_in_row)
            w = (w_float32 * multipliers).astype(dtype)
        weighted = [_dot(w, rows, NN) for rows in v]
        if values.buffers.offsets is not None:
            offsets = values.of_slot_in_row(values.buffers.offsets, head, slot_in_row)
            offset = (w_float32 * offsets).sum(axis=1, keepdims=True)
            weighted = [part + offset for part in weighted]
        if group_scales is not None and layout.has_offset:
            weighted = _add_group_offsets(refs.call, weighted, w_float32, group_scales)
        total = [
            acc + layout.select_slot(part, slot_in_row) for acc, part in zip(total, weighted, strict=True)
        ]
    return total


def _add_group_offsets(
    call: TPUCall,
    weighted: list[jax.Array],  # [q_rows, row_width] per code of a byte
    weights: jax.Array,  # [q_rows, rows]
    scales: jax.Array,  # [pages, groups]
) -> list[jax.Array]:
    """Return the weighted values with the weighted offsets of their channels added."""
    layout = call.values
    per_page = _dot(weights, layout.page_of_row(call.pages_per_tile), NT)  # [q_rows, pages]
    return [
        part + _dot(per_page, layout.lane_offsets(scales, byte_index), NN)
        for byte_index, part in enumerate(weighted)
    ]


def _regroup_weights(call: TPUCall, weights: list[jax.Array]) -> list[jax.Array]:
    """Return weights for each slot in a row of keys as weights for each slot in a row of values.

    Rows of keys and of values hold different numbers of slots if their codes differ in size.
    """
    k_slots, v_slots = call.keys.slots_per_row, call.values.slots_per_row
    if k_slots == v_slots:
        return weights
    joined = jnp.concatenate(weights, axis=1)  # [q_rows, kv_tile], in the order of the keys' slots in rows
    shape = call.kv_tile, call.kv_tile // v_slots
    index = lax.broadcasted_iota(jnp.int32, shape, 0)
    v_row = lax.broadcasted_iota(jnp.int32, shape, 1)
    k_rows = call.kv_tile // k_slots
    slot = lax.rem(index, k_rows) * k_slots + lax.div(index, k_rows)
    # Dot products with one-hot matrices, because a TPU cannot gather along lanes.
    one_hots = [
        (slot == v_row * v_slots + slot_in_row).astype(joined.dtype) for slot_in_row in range(v_slots)
    ]
    return [_dot(joined, one_hot, NN).astype(joined.dtype) for one_hot in one_hots]


def _sum(arrays: Iterable[jax.Array]) -> jax.Array:
    return functools.reduce(jnp.add, arrays)


def _dot(lhs: jax.Array, rhs: jax.Array, dimension_numbers: Any) -> jax.Array:
    """Return a dot product in float32; of float32 operands in the highest precision, which TPUs do not default to."""
    precision = lax.Precision.HIGHEST if lhs.dtype == jnp.float32 else None
    return lax.dot_general(
        lhs, rhs, dimension_numbers, precision=precision, preferred_element_type=jnp.float32
    )
