"""The Pallas kernel of the ``tpu`` backend: one query tile after another, each over tiles of keys and values.

The softmax is an online one (Milakov and Gimelshein, 2018), kept per KV head. ``_tpu_refs`` names the shapes,
and ``_tpu_copies`` copies the tiles to the chip.
"""

import functools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from qpaged._compat import kernel_output
from qpaged.attention._options import MASK_VALUE
from qpaged.attention._tpu_copies import (
    copied_rows,
    start_copies,
    start_next_copies,
    visible_kv_tiles,
    wait_for_copies,
)
from qpaged.attention._tpu_layout import NN, NT, dot
from qpaged.attention._tpu_refs import Buffers, HBMPool, Index, KVRefs, KVTile, Ref, Refs, State, TPUCall


def attend(
    call: TPUCall,
    visible_range: jax.Array,  # [2 * num_q_tiles] int32: each one's first and last visible slot, or 0 and -1
    position: jax.Array,  # [num_q_tiles * q_tile] int32, of each query
    table: jax.Array,  # [sequences * table_pages] int32
    query: jax.Array,  # [num_q_tiles, kv_heads, codes_per_byte, q_rows, row_width]
    keys: HBMPool,
    values: HBMPool,
) -> tuple[jax.Array, jax.Array]:
    """Return the attention and the log-sum-exps, float32.

    They are [num_q_tiles, kv_heads, codes_per_byte, q_rows, row_width] and [num_q_tiles, kv_heads, q_rows].
    Where several slots share a row, the lanes of place i in the row hold the sum over the slots that lie at
    place i: :meth:`TPULayout.sum_over_slots` adds these up.
    """
    kv_heads = keys.pages.shape[0]
    out_shape = (
        call.num_q_tiles, kv_heads, call.values.codes_per_byte, call.q_rows, call.values.row_width,
    )  # fmt: skip
    buffers = Buffers.specs(call, call.keys, keys), Buffers.specs(call, call.values, values)
    lse_shape = call.num_q_tiles, kv_heads, call.q_rows
    inputs = query, (keys, values)
    operands = visible_range, position, table, inputs
    return pl.pallas_call(
        functools.partial(_kernel, call),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(call.num_q_tiles,),
            in_specs=(_per_q_tile(query.shape), _in_hbm((keys, values))),
            out_specs=(_per_q_tile(out_shape), _per_q_tile(lse_shape)),
            scratch_shapes=(buffers, State.specs(call, kv_heads)),
        ),
        out_shape=(
            kernel_output(out_shape, jnp.float32, operands),
            kernel_output(lse_shape, jnp.float32, operands),
        ),
        name="paged_attention",
    )(visible_range, position, table, *inputs)


def _per_q_tile(shape: tuple[int, ...]) -> pl.BlockSpec:
    """Return the specification of an array whose first axis is the query tiles'."""

    def block_index(q_tile_index: jax.Array, *_: Ref) -> tuple[Index, ...]:
        return q_tile_index, *[0] * (len(shape) - 1)

    return pl.BlockSpec((1, *shape[1:]), block_index)


def _in_hbm(pools: tuple[HBMPool, HBMPool]) -> Any:
    """Return specifications that leave arrays in HBM, for the kernel to copy from."""
    return jax.tree_util.tree_map(lambda _: pl.BlockSpec(memory_space=pl.ANY), pools)


def _kernel(
    call: TPUCall,
    visible_range_ref: Ref,  # [2 * num_q_tiles]
    position_ref: Ref,  # [num_q_tiles * q_tile]
    table_ref: Ref,  # [sequences * table_pages]
    query_ref: Ref,  # [1, kv_heads, codes_per_byte, q_rows, row_width]
    pools: tuple[HBMPool, HBMPool],
    out_ref: Ref,  # [1, kv_heads, codes_per_byte, q_rows, row_width]
    lse_ref: Ref,  # [1, kv_heads, q_rows]
    buffers: tuple[Buffers, Buffers],
    state: State,
) -> None:
    """Attend one query tile to all tiles of keys and values that it sees."""
    keys = KVRefs(call.keys, pools[0], buffers[0])
    values = KVRefs(call.values, pools[1], buffers[1])
    kv_heads = query_ref.shape[1]
    q_tile_index = pl.program_id(0)
    refs = Refs(
        call, q_tile_index, visible_range_ref, position_ref, table_ref, query_ref, keys, values, state
    )
    first, end = visible_kv_tiles(refs, q_tile_index)

    @pl.when(q_tile_index == 0)
    def start_first_copies() -> None:
        state.tiles_done[0] = 0
        start_copies(refs, q_tile_index, first, 0)

    _initialize_state(refs)

    def attend_kv_tile(kv_tile_index: jax.Array, _: None) -> None:
        # Tiles are counted over all query tiles: their two buffers alternate, also from one query tile to the
        # next.
        buffer_index = lax.rem(state.tiles_done[0], 2)
        start_next_copies(refs, kv_tile_index, end, buffer_index)
        wait_for_copies(refs, kv_tile_index, buffer_index)
        for kv in (keys, values):
            kv.compute_multipliers(call, buffer_index)
            _mark_visible(refs, kv, kv_tile_index)
        tile = KVTile(
            index=kv_tile_index,
            buffer_index=buffer_index,
            copied=copied_rows(refs, kv_tile_index),
            first_visible=refs.first_visible(q_tile_index),
            last_visible=refs.last_visible(q_tile_index),
        )

        def attend_head(head: jax.Array, _: None) -> None:
            _attend_head(refs, tile, head)

        lax.fori_loop(0, kv_heads, attend_head, None)
        state.tiles_done[0] += 1

    lax.fori_loop(first, end, attend_kv_tile, None)
    # Query rows that see nothing have a sum of 0, and give 0.
    row_sum = state.row_sum[...]  # [kv_heads, q_rows, 1]
    is_seen = row_sum != 0  # also where the sum is NaN, which is to be seen
    total = jnp.where(is_seen, row_sum, 1)
    out_ref[0] = state.acc[...] / total[:, None]
    lse_ref[0] = jnp.where(is_seen, state.row_max[...] + jnp.log(total), -jnp.inf)[..., 0]


def _initialize_state(refs: Refs) -> None:
    """Set the state before the first slot."""
    call, state = refs.call, refs.state
    row = lax.broadcasted_iota(jnp.int32, (call.q_rows, 1), 0)
    state.position[...] = _load_positions(refs, lax.div(row, call.q_heads_per_kv))
    state.acc[...] = jnp.zeros(state.acc.shape, jnp.float32)
    state.row_max[...] = jnp.full(state.row_max.shape, MASK_VALUE, jnp.float32)
    state.row_sum[...] = jnp.zeros(state.row_sum.shape, jnp.float32)


def _load_positions(refs: Refs, query_index: jax.Array) -> jax.Array:
    """Return the positions of the queries ``query_index`` of this query tile, as a vector of its shape."""
    q_tile = refs.call.q_tile
    first = refs.q_tile_index * q_tile

    # SMEM is read one number at a time.
    def load_position(index: jax.Array, positions: jax.Array) -> jax.Array:
        return jnp.where(query_index == index, refs.position[first + index], positions)

    return lax.fori_loop(0, q_tile, load_position, jnp.full(query_index.shape, -1, jnp.int32))


def _mark_visible(refs: Refs, kv: KVRefs, kv_tile_index: jax.Array) -> None:
    """Fill the buffer ``visible`` for a tile, if the call has that buffer."""
    visible_ref, layout, call = kv.buffers.visible, kv.layout, refs.call
    if visible_ref is None:
        return
    query_index = lax.broadcasted_iota(jnp.int32, (1, call.q_tile), 1)
    position = _load_positions(refs, query_index)
    row = lax.broadcasted_iota(jnp.int32, (len(visible_ref), 1), 0)
    visible = jnp.zeros(visible_ref.shape, jnp.float32)
    for slot_in_row in range(layout.slots_per_row):
        slot = kv_tile_index * call.kv_tile + row * layout.slots_per_row + slot_in_row
        is_visible = call.options.position_mask(position, slot) & (
            slot <= refs.last_visible(refs.q_tile_index)
        )
        mask = jnp.where(is_visible, 1.0, 0.0)  # [rows, q_tile]
        any_query = jnp.broadcast_to(mask.max(axis=1, keepdims=True), visible_ref.shape)
        visible += layout.select_slot(any_query, slot_in_row)
    visible_ref[...] = visible


def _visible_elements(refs: Refs, kv: KVRefs, tile: KVTile) -> jax.Array:
    """Return [rows, row_width], True for the elements of slots that any query of the query tile sees.

    The elements of other slots may be NaN, and zero times NaN is NaN: they are made zeros before a dot
    product.
    """
    if kv.buffers.visible is not None:
        return kv.buffers.visible[...] > 0
    num_rows = refs.call.kv_tile // kv.layout.slots_per_row
    slot = tile.index * refs.call.kv_tile + kv.layout.slot_of_element(num_rows)
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
    # The sum is of the rounded weights, so that what the values are multiplied by adds up to one.
    # (Multipliers of slots come into the weights later, and are rounded again.)
    tile_sum = _sum(w.astype(jnp.float32).sum(axis=1, keepdims=True) for w in weights)
    l_prev = state.row_sum[head]
    state.row_sum[head] = l_prev * alpha + tile_sum
    for byte_index, weighted in enumerate(_weighted_values(refs, tile, head, weights)):
        state.acc[head, byte_index] = state.acc[head, byte_index] * alpha + weighted


def _attention_masks(refs: Refs, tile: KVTile, scores: list[jax.Array]) -> list[jax.Array]:
    """Return a mask [q_rows, rows] for each slot in a row, as :func:`_scores` returns scores."""
    call = refs.call
    position = refs.state.position[...]
    masks = []
    for slot_in_row in range(call.keys.slots_per_row):
        row = lax.broadcasted_iota(jnp.int32, scores[slot_in_row].shape, 1)
        slot_in_tile = row * call.keys.slots_per_row + slot_in_row
        # "No page" was not copied: the buffer holds an earlier tile's keys there.
        slot = tile.index * call.kv_tile + slot_in_tile
        is_before_end = slot <= tile.last_visible
        masks.append(call.options.position_mask(position, slot) & is_before_end & tile.copied)
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
        dots = _sum(dot(part, rows, NT) for part, rows in zip(q_slot, k, strict=True))
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

    The slots of a row are of one page and share its offsets, since formats with offsets of groups in each
    slot are declined. So the query for the first slot of a row serves all.
    """
    layout = call.keys
    per_page = _sum(
        dot(layout.select_slot(part, 0).astype(jnp.float32), layout.lane_offsets(scales, byte_index), NT)
        for byte_index, part in enumerate(q)
    )
    # The matrix is one-hot: it repeats each page's value for its rows.
    return dot(per_page, layout.page_of_row(call.pages_per_tile), NN)


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
            w = (w_float32 * multipliers).astype(dtype)  # the dtype that the MXU multiplies values in
        weighted = [dot(w, rows, NN) for rows in v]
        if values.buffers.offsets is not None:
            offsets = values.of_slot_in_row(values.buffers.offsets, head, slot_in_row)
            offset = (w_float32 * offsets).sum(axis=1, keepdims=True)
            weighted = [
                part + offset for part in weighted
            ]  # in all lanes, of which select_slot keeps this place's
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
    # The one-hot matrix sums the weights of each page's rows.
    per_page = dot(weights, layout.page_of_row(call.pages_per_tile), NT)  # [q_rows, pages]
    return [
        part + dot(per_page, layout.lane_offsets(scales, byte_index), NN)
        for byte_index, part in enumerate(weighted)
    ]


def _regroup_weights(call: TPUCall, weights: list[jax.Array]) -> list[jax.Array]:
    """Return weights for each slot in a row of keys as weights for each slot in a row of values.

    Rows of keys and of values hold different numbers of slots if their codes differ in size.
    """
    k_slots, v_slots = call.keys.slots_per_row, call.values.slots_per_row
    if k_slots == v_slots:
        return weights
    joined = jnp.concatenate(weights, axis=1)  # [q_rows, kv_tile]: all first places, all second ones, ...
    shape = call.kv_tile, call.kv_tile // v_slots
    index = lax.broadcasted_iota(jnp.int32, shape, 0)
    v_row = lax.broadcasted_iota(jnp.int32, shape, 1)
    k_rows = call.kv_tile // k_slots
    slot = lax.rem(index, k_rows) * k_slots + lax.div(index, k_rows)  # that column ``index`` is the weight of
    # Dot products with one-hot matrices, because a TPU cannot gather along lanes.
    one_hots = [
        (slot == v_row * v_slots + slot_in_row).astype(joined.dtype) for slot_in_row in range(v_slots)
    ]
    return [dot(joined, one_hot, NN).astype(joined.dtype) for one_hot in one_hots]


def _sum(arrays: Iterable[jax.Array]) -> jax.Array:
    return functools.reduce(jnp.add, arrays)
