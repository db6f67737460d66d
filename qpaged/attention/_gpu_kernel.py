"""The Mosaic GPU kernel of the ``gpu`` backend: a query tile over one split of its sequence.

A program of the grid is one warpgroup, and has one KV head. It decodes codes in registers and writes them to
shared memory as bfloat16 for the tensor cores. The operands are transposed: slots are the 64 rows and queries
the columns, so that few queries cost little. Scales are applied to the scores and to the weights. The caller
merges the splits of a sequence (Dao et al., Flash-Decoding, 2023).
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike

from qpaged._compat import (
    Jaxpr,
    inner_jaxprs,
    jaxpr_and_consts,
    mosaic_gpu_load,
    mosaic_gpu_store,
)
from qpaged.attention._gpu import KV_TILE
from qpaged.attention._gpu_copies import TilePages, is_page, load_tile_pages, start_copies
from qpaged.attention._gpu_refs import GMEMPool, GPUCall, KVRefs, Ref, Refs, Scratch
from qpaged.attention._layout import Layout
from qpaged.attention._options import MASK_VALUE
from qpaged.formats import Quantizer

# How arrays lie in the registers of a warpgroup.
MATRIX = plgpu.Layout.WGMMA  # [slots, queries], what the tensor cores give
TRANSPOSED = plgpu.Layout.WGMMA_TRANSPOSED
PER_SLOT = MATRIX.reduce(1)  # [slots]
PER_QUERY = MATRIX.reduce(0)  # [queries]


class QueryRows(NamedTuple):
    """The query rows of a tile, in registers.

    Attributes:
        position: [q_rows] int32.
        channel_sum: [q_rows] float32, the sum of the query's channels.
    """

    position: jax.Array
    channel_sum: jax.Array


class SlotScales(NamedTuple):
    """The factor of each slot's codes and what is added to them, [KV_TILE] float32 each; None for none."""

    multiplier: jax.Array | None
    offset: jax.Array | None


class State(NamedTuple):
    """The online softmax over the tiles so far, and the pages of the tile to come.

    Attributes:
        row_max: [q_rows] float32, the highest score.
        row_sum: [KV_TILE, q_rows] float32, the weights, summed over tiles and not yet over a tile's slots.
        offset_sum: [KV_TILE, q_rows] float32, the values' weighted offsets, likewise.
        acc: [head_dim, q_rows] float32, the weighted values.
        tile_pages: the pages of the next tile.
    """

    row_max: jax.Array
    row_sum: jax.Array
    offset_sum: jax.Array
    acc: jax.Array
    tile_pages: TilePages


def attend(
    call: GPUCall,
    visible_range: jax.Array,  # [2 * num_q_tiles] int32, first and last visible slot; 0 and -1 for none
    position: jax.Array,  # [num_q_tiles, q_rows] int32
    table: jax.Array,  # [sequences * table_pages] int32
    query: jax.Array,  # [num_q_tiles, kv_heads, codes_per_byte, q_rows, slot_width] bfloat16
    query_sum: jax.Array,  # [num_q_tiles, kv_heads, q_rows] float32, over the channels
    keys: GMEMPool,
    values: GMEMPool,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return acc, row_max and row_sum of every split, all float32.

    acc [splits, num_q_tiles, kv_heads, head_dim, q_rows] is the sum of values times exp(score - row_max); its
    channels are in the order of [codes_per_byte, slot_width]. row_max and row_sum are
    [splits, num_q_tiles, kv_heads, q_rows].
    """
    kv_heads = keys.pages.shape[0]
    per_row = jax.ShapeDtypeStruct((call.splits, call.num_q_tiles, kv_heads, call.q_rows), jnp.float32)
    acc_shape = call.splits, call.num_q_tiles, kv_heads, call.values.head_dim, call.q_rows
    return plgpu.kernel(
        functools.partial(_kernel, call),
        out_type=(jax.ShapeDtypeStruct(acc_shape, jnp.float32), per_row, per_row),
        scratch_types=[Scratch.specs(call, keys, values)],
        grid=(call.num_q_tiles, kv_heads, call.splits),
        grid_names=("q_tile", "head", "split"),
    )(visible_range, position, table, query, query_sum, keys, values)


def _kernel(
    call: GPUCall,
    visible_range_ref: Ref,  # [2 * num_q_tiles]
    position_ref: Ref,  # [num_q_tiles, q_rows]
    table_ref: Ref,  # [sequences * table_pages]
    query_ref: Ref,  # [num_q_tiles, kv_heads, codes_per_byte, q_rows, slot_width]
    query_sum_ref: Ref,  # [num_q_tiles, kv_heads, q_rows]
    k_pool: GMEMPool,
    v_pool: GMEMPool,
    acc_ref: Ref,  # [splits, num_q_tiles, kv_heads, head_dim, q_rows]
    row_max_ref: Ref,  # [splits, num_q_tiles, kv_heads, q_rows]
    row_sum_ref: Ref,  # [splits, num_q_tiles, kv_heads, q_rows]
    scratch: Scratch,
) -> None:
    """Attend one query tile, for one KV head, to one split of its sequence."""
    q_tile = lax.axis_index("q_tile")
    head = lax.axis_index("head")
    split = lax.axis_index("split")
    for byte_index in range(call.keys.codes_per_byte):
        source = query_ref.at[q_tile, head, byte_index]
        plgpu.copy_gmem_to_smem(source, scratch.query.at[byte_index], scratch.query_copied)
    first_visible = visible_range_ref[2 * q_tile]
    last_visible = visible_range_ref[2 * q_tile + 1]
    start, end = _tiles_of_split(call, first_visible, last_visible, split)
    refs = Refs(
        call=call,
        sequence=lax.div(q_tile, jnp.int32(call.tiles_per_run)),
        head=head,
        first_visible=first_visible,
        last_visible=last_visible,
        end=end,
        table=table_ref,
        keys=KVRefs(call.keys, k_pool, scratch.keys),
        values=KVRefs(call.values, v_pool, scratch.values),
        scratch=scratch,
    )
    for stage in range(call.stages):
        start_copies(refs, start + stage, jnp.int32(stage))
    plgpu.barrier_wait(scratch.query_copied)
    position = mosaic_gpu_load(position_ref.at[q_tile], PER_QUERY)
    queries = QueryRows(position, mosaic_gpu_load(query_sum_ref.at[q_tile, head], PER_QUERY))

    def attend_kv_tile(kv_tile: jax.Array, state: State) -> State:
        stage = lax.rem(kv_tile - start, jnp.int32(call.stages))
        return _attend_kv_tile(refs, queries, kv_tile, stage, state)

    state = lax.fori_loop(start, end, attend_kv_tile, _initial_state(refs, start))
    mosaic_gpu_store(row_max_ref.at[split, q_tile, head], state.row_max)
    mosaic_gpu_store(row_sum_ref.at[split, q_tile, head], state.row_sum.sum(axis=0))
    acc = state.acc
    if call.values.has_offset:
        acc = acc + _repeat_rows(state.offset_sum.sum(axis=0), len(acc))
    mosaic_gpu_store(acc_ref.at[split, q_tile, head], acc)


def _tiles_of_split(
    call: GPUCall, first_visible: jax.Array, last_visible: jax.Array, split: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Return the first tile of a split, and one past the last."""
    first = lax.div(first_visible, jnp.int32(KV_TILE))
    # Nothing is visible if last_visible is -1, and the number of tiles is 0.
    num_tiles = lax.div(last_visible + jnp.int32(KV_TILE), jnp.int32(KV_TILE)) - first
    tiles_per_split = lax.div(num_tiles + jnp.int32(call.splits - 1), jnp.int32(call.splits))
    start = first + split * tiles_per_split
    return start, jnp.minimum(start + tiles_per_split, first + num_tiles)


def _initial_state(refs: Refs, start: jax.Array) -> State:
    call = refs.call

    def zeros(rows: int) -> jax.Array:
        return plgpu.layout_cast(jnp.zeros((rows, call.q_rows), jnp.float32), MATRIX)

    return State(
        row_max=plgpu.layout_cast(jnp.full((call.q_rows,), MASK_VALUE, jnp.float32), PER_QUERY),
        row_sum=zeros(KV_TILE),
        offset_sum=zeros(KV_TILE),
        acc=zeros(call.values.head_dim),
        tile_pages=load_tile_pages(refs, start),
    )


def _attend_kv_tile(
    refs: Refs, queries: QueryRows, kv_tile: jax.Array, stage: jax.Array, state: State
) -> State:
    """Add a tile of keys and values to the online softmax."""
    call, scratch = refs.call, refs.scratch
    m_prev, l_prev, offset_sum, acc, tile_pages = state
    # The next tile's pages and scales are loaded while this tile is computed with.
    next_pages = load_tile_pages(refs, kv_tile + 1)
    plgpu.barrier_wait(scratch.tile_copied.at[stage])

    _write_decoded(refs.keys, stage, scratch.decoded)
    plgpu.commit_smem()  # without which the tensor cores may read what was there before
    dots = _dot_keys(refs)  # it waits for the product, so that `decoded` may take the values afterwards
    k_scales = _load_slot_scales(call, refs.keys, stage, tile_pages.k_scales)
    v_scales = _load_slot_scales(call, refs.values, stage, tile_pages.v_scales)
    scores = _scores(call, queries, dots, k_scales)

    slot_has_page = _slot_has_page(call, tile_pages.pages)
    mask = _attention_mask(refs, queries, kv_tile, slot_has_page)
    m_next = jnp.maximum(m_prev, jnp.where(mask, scores, MASK_VALUE).max(axis=0))
    alpha = jnp.exp(m_prev - m_next)
    weights = jnp.where(mask, jnp.exp(scores - _repeat_rows(m_next)), 0.0)
    l_next = l_prev * _repeat_rows(alpha) + weights
    # Scales of masked slots may be NaN.
    if v_scales.offset is not None:
        offset_sum = offset_sum * _repeat_rows(alpha)
        offset_sum += jnp.where(mask, weights * _repeat_columns(v_scales.offset, call.q_rows), 0.0)
    if v_scales.multiplier is not None:
        weights = jnp.where(mask, weights * _repeat_columns(v_scales.multiplier, call.q_rows), 0.0)
    weights = plgpu.layout_cast(weights.astype(jnp.bfloat16), TRANSPOSED)
    scratch.weights.transpose((1, 0))[...] = weights
    _write_decoded_values(refs, kv_tile, stage, tile_pages.pages, slot_has_page)
    plgpu.commit_smem()

    # Keys and values of this stage are decoded: its buffers are free.
    start_copies(refs, kv_tile + call.stages, stage)
    weighted = _dot_values(refs)
    acc = acc * _repeat_rows(alpha, len(acc)) + weighted
    return State(m_next, l_next, offset_sum, acc, next_pages)


def _dot_keys(refs: Refs) -> jax.Array:
    """Return the dot products of the decoded keys and the query, [KV_TILE, q_rows] float32."""
    scratch, keys = refs.scratch, refs.keys

    def multiply(acc_ref: Ref) -> jax.Array:
        for byte_index in range(keys.layout.codes_per_byte):
            k = scratch.decoded.at[:, keys.decoded_columns(byte_index)]
            plgpu.wgmma(acc_ref, k, scratch.query.at[byte_index].transpose((1, 0)))
        return acc_ref[...]

    return pl.run_scoped(multiply, plgpu.ACC((KV_TILE, refs.call.q_rows), jnp.float32))


def _dot_values(refs: Refs) -> jax.Array:
    """Return the dot products of the decoded values and the weights, [head_dim, q_rows] float32."""
    scratch = refs.scratch

    def multiply(acc_ref: Ref) -> jax.Array:
        plgpu.wgmma(acc_ref, scratch.decoded.transpose((1, 0)), scratch.weights.transpose((1, 0)))
        return acc_ref[...]

    return pl.run_scoped(multiply, plgpu.ACC((refs.call.values.head_dim, refs.call.q_rows), jnp.float32))


def _scores(
    call: GPUCall,
    queries: QueryRows,
    dots: jax.Array,  # [KV_TILE, q_rows]
    scales: SlotScales,
) -> jax.Array:
    """Return the scores of dot products with keys in units of their scales, [KV_TILE, q_rows]."""
    if scales.multiplier is not None:
        dots = dots * _repeat_columns(scales.multiplier, call.q_rows)
    if scales.offset is not None:
        # q . (k + offset) = q . k + sum(q) * offset
        dots = dots + _repeat_rows(queries.channel_sum) * _repeat_columns(scales.offset, call.q_rows)
    return call.options.scale_and_cap(dots)


def _attention_mask(
    refs: Refs,
    queries: QueryRows,
    kv_tile: jax.Array,
    slot_has_page: jax.Array,  # [KV_TILE]
) -> jax.Array:
    """Return [KV_TILE, q_rows], True where a query sees a slot of the tile."""
    call = refs.call
    slot = kv_tile * KV_TILE + plgpu.broadcasted_iota(jnp.int32, (KV_TILE, call.q_rows), 0, layout=MATRIX)
    mask = call.options.position_mask(_repeat_rows(queries.position), slot) & (slot <= refs.last_visible)
    return mask & _repeat_columns(slot_has_page, call.q_rows)


def _write_decoded_values(
    refs: Refs,
    kv_tile: jax.Array,
    stage: jax.Array,
    pages: tuple[jax.Array, ...],
    slot_has_page: jax.Array,  # [KV_TILE]
) -> None:
    """Decode a tile's values, with zeros in slots that no query sees.

    Such a slot may hold NaN, and a weight of zero times NaN is NaN.
    """
    first_slot = kv_tile * KV_TILE
    slot = first_slot + _slot_iota()
    slot_visible = (slot >= refs.first_visible) & (slot <= refs.last_visible) & slot_has_page

    fully_visible = (first_slot >= refs.first_visible) & (first_slot + KV_TILE - 1 <= refs.last_visible)
    for page in pages:
        fully_visible &= is_page(refs.call, page)

    # Most tiles need no mask.
    @pl.when(fully_visible)
    def write_all() -> None:
        _write_decoded(refs.values, stage, refs.scratch.decoded)

    @pl.when(~fully_visible)
    def write_visible() -> None:
        _write_decoded(refs.values, stage, refs.scratch.decoded, slot_visible)


def _write_decoded(
    kv: KVRefs,
    stage: jax.Array,
    decoded_ref: Ref,  # [KV_TILE, head_dim]
    slot_mask: jax.Array | None = None,  # [KV_TILE]
) -> None:
    """Decode a tile to bfloat16, in units of its scales, with zeros in masked slots."""
    layout = kv.layout
    for run in range(layout.runs):
        planes = kv.load_run(stage, run)
        for byte_index in range(layout.codes_per_byte):
            codes = layout.codes_of_run(planes, byte_index, run)
            values = _decode_codes(layout, codes).astype(jnp.bfloat16)
            if slot_mask is not None:
                mask = _repeat_columns(slot_mask, layout.run_width)
                values = jnp.where(mask, values, jnp.zeros((), values.dtype))
            decoded_ref[:, kv.decoded_run(byte_index, run)] = values


def _decode_codes(layout: Layout, codes: jax.Array) -> jax.Array:
    if layout.quantizer is None:
        return codes
    return layout.quantizer.decode(codes, _decode_dtype(layout.quantizer, codes))


def _decode_dtype(quantizer: Quantizer, codes: jax.Array) -> DTypeLike:
    """Return bfloat16, in which decoded values are exact; float32 for fp8, which converts to nothing else."""

    def decode(codes: jax.Array) -> jax.Array:
        return quantizer.decode(codes, jnp.bfloat16)

    jaxpr = jax.make_jaxpr(decode)(jax.ShapeDtypeStruct(codes.shape, codes.dtype))
    return jnp.float32 if _makes_float8(jaxpr) else jnp.bfloat16


def _makes_float8(jaxpr: Jaxpr) -> bool:
    """Return True if any equation of a jaxpr, inner ones included, gives floats of 8 bits."""
    for eqn in jaxpr_and_consts(jaxpr)[0].eqns:
        if any(_makes_float8(inner) for inner in inner_jaxprs(eqn)):
            return True
        for out in eqn.outvars:
            if jnp.issubdtype(out.aval.dtype, jnp.floating) and out.aval.dtype.itemsize == 1:
                return True
    return False


def _load_slot_scales(
    call: GPUCall, kv: KVRefs, stage: jax.Array, page_scales: tuple[jax.Array, ...]
) -> SlotScales:
    """Return the multiplier and the offset of each slot of a tile."""
    if kv.pool.scales is None:
        return SlotScales(None, None)
    if kv.has_page_scales:
        scales = _repeat_for_slots(call, page_scales).astype(kv.pool.scales.dtype)
    else:
        scales = mosaic_gpu_load(kv.stages.scales.at[stage], PER_SLOT)
    quantizer = kv.layout.quantizer
    multiplier = quantizer.multiplier(scales)
    if not kv.layout.has_offset:
        return SlotScales(multiplier, None)
    return SlotScales(multiplier, quantizer.offset.from_scales(scales))


def _slot_has_page(call: GPUCall, pages: tuple[jax.Array, ...]) -> jax.Array:
    """Return [KV_TILE], True where the slot's entry of the page table is a page."""
    has_page = tuple(is_page(call, page).astype(jnp.int32) for page in pages)
    return _repeat_for_slots(call, has_page) > 0


def _repeat_for_slots(call: GPUCall, per_copy: tuple[jax.Array, ...]) -> jax.Array:
    """Return [KV_TILE], each slot with the entry of the copy that brings it."""
    slot = _slot_iota()
    per_slot = jnp.zeros((), per_copy[0].dtype)
    # Selects, because the entries are scalars in registers, which cannot be indexed.
    for copy_index in reversed(range(call.copies_per_tile)):
        per_slot = jnp.where(slot < (copy_index + 1) * call.copy_slots, per_copy[copy_index], per_slot)
    return per_slot


def _slot_iota() -> jax.Array:
    """Return [KV_TILE], the slots of a tile in order."""
    return plgpu.broadcasted_iota(jnp.int32, (KV_TILE,), 0, layout=PER_SLOT)


def _repeat_columns(per_slot: jax.Array, columns: int) -> jax.Array:
    """Return [KV_TILE] as [KV_TILE, columns]."""
    return lax.broadcast_in_dim(per_slot, (KV_TILE, columns), (0,))


def _repeat_rows(per_query: jax.Array, rows: int = KV_TILE) -> jax.Array:
    """Return [q_rows] as [rows, q_rows]."""
    return lax.broadcast_in_dim(per_query, (rows, per_query.shape[0]), (1,))
