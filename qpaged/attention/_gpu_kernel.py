"""The Mosaic GPU kernel of the ``gpu`` backend: a tile of 64 query rows over one share of its sequence.

A program of the grid is one warpgroup. It copies blocks of 64 slots of one KV head from the pool, as the page
table says, into one of several buffers, while it computes with the block before. Codes are decoded in
registers and laid down as bfloat16 for the tensor cores; scales are applied to the scores and to the weights.
What the shares of a sequence come to is merged by the caller (Dao et al., Flash-Decoding, 2023).
"""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from qpaged.attention._options import FLOOR, Options
from qpaged.attention._tpu_pages import BITS, Pages

ROWS = 64  # query rows of a tile: what the tensor cores take at once
SLOTS = 64  # slots of a block
STAGES = 2  # buffers of blocks
MATRIX = plgpu.Layout.WGMMA
OF_ROWS, OF_COLUMNS = MATRIX.reduce(1), MATRIX.reduce(0)


@dataclass(frozen=True)
class Plan:
    """What is static of one call.

    Attributes:
        keys: how the pages of keys lie.
        values: how those of values do.
        options: of the attention.
        tiles: tiles of query rows.
        splits: shares of a sequence, each a program of its own.
        table_pages: pages of a row of the table, whole blocks of them.
        shared: whether all tiles are of one sequence, the table's only row.
    """

    keys: Pages
    values: Pages
    options: Options
    tiles: int
    splits: int
    table_pages: int
    shared: bool

    @property
    def chunk(self) -> int:
        """Slots that one copy brings: a page, or a block's part of one."""
        return min(self.keys.page_size, SLOTS)


@dataclass(frozen=True)
class Side:
    """The references of keys, or of values: the pool, its slots' factors and shifts, and the buffers."""

    layout: Pages
    pool: Any
    factors: Any
    shifts: Any
    buffer: Any
    decoded: Any


def attend(plan: Plan, bounds, position, table, query, summed, keys, values, parts):
    """Sums (splits, tiles, kv_heads, places, rows, width), tops and totals (splits, tiles, kv_heads, rows).

    All float32, and not yet divided: a sum is one of values times exp(score - top).

    Args:
        bounds: (2 · tiles,) int32; of each tile the first and the last slot that any query sees; 0 and -1
            where none does.
        position: (tiles, rows) int32.
        table: (sequences · table_pages,) int32.
        query: (tiles, kv_heads, places, rows, width) bfloat16.
        summed: (tiles, kv_heads, rows) float32, each row of the query summed up.
        keys, values: (kv_heads, pages, page_size, width); codes, or floats.
        parts: factors and shifts of keys, then of values, (sequences, kv_heads, slots) float32 or None.
    """
    heads = keys.shape[0]
    present = [part is not None for part in parts]
    rows = jax.ShapeDtypeStruct((plan.splits, plan.tiles, heads, ROWS), jnp.float32)
    sums = (plan.splits, plan.tiles, heads, plan.values.places, ROWS, plan.values.width)
    scratch = [_matrix(plan.keys.places, ROWS, plan.keys.width), _matrix(1, ROWS, SLOTS)]
    for layout, pool in ((plan.keys, keys), (plan.values, values)):
        scratch.append(plgpu.SMEM((STAGES, SLOTS, layout.width), pool.dtype))
        scratch.append(_matrix(layout.places, SLOTS, layout.width))
    arrivals = 2 * SLOTS // plan.chunk
    scratch += [plgpu.Barrier(), plgpu.Barrier(num_arrivals=arrivals, num_barriers=STAGES)]
    return plgpu.kernel(
        functools.partial(_kernel, plan, present),
        out_type=(jax.ShapeDtypeStruct(sums, jnp.float32), rows, rows),
        scratch_types=scratch,
        grid=(plan.tiles, heads, plan.splits),
        grid_names=("tile", "head", "split"),
    )(bounds, position, table, query, summed, keys, values, *(p for p in parts if p is not None))


def _matrix(places: int, rows: int, width: int) -> Any:
    """Shared memory for bfloat16 operands of the tensor cores."""
    row = min(64, width)
    transforms = plgpu.TilingTransform((8, row)), plgpu.SwizzleTransform(2 * row)
    return plgpu.SMEM((places, rows, width), jnp.bfloat16, transforms=transforms)


def _kernel(plan: Plan, present: list[bool], *refs: Any) -> None:
    bounds, position, table, query, summed, keys, values, *rest = refs
    given = iter(rest)
    k, k_shift, v, v_shift = (next(given) if there else None for there in present)
    sums, tops, totals, q, weights, key_codes, key_values, value_codes, value_values, ready, filled = given
    keys = Side(plan.keys, keys, k, k_shift, key_codes, key_values)
    values = Side(plan.values, values, v, v_shift, value_codes, value_values)
    tile, head, split = (lax.axis_index(name) for name in ("tile", "head", "split"))
    plgpu.copy_gmem_to_smem(query.at[tile, head], q, ready)
    low, high = bounds[2 * tile], bounds[2 * tile + 1]
    row = jnp.int32(0) if plan.shared else tile
    first = lax.div(low, jnp.int32(SLOTS))
    blocks = lax.div(high + jnp.int32(SLOTS), jnp.int32(SLOTS)) - first  # none where high is -1
    share = lax.div(blocks + jnp.int32(plan.splits - 1), jnp.int32(plan.splits))
    start = first + split * share
    end = jnp.minimum(start + share, first + blocks)
    pages = functools.partial(_pages, plan, table, row)
    copy = functools.partial(_copy, plan, head, keys, values, filled)

    for stage in range(STAGES):

        @pl.when(start + stage < end)
        def _first(stage=stage):
            copy(pages(start + stage), start + stage, jnp.int32(stage))

    plgpu.barrier_wait(ready)
    at = _load(position.at[tile], OF_ROWS)
    sum_q = _load(summed.at[tile, head], OF_ROWS)

    def step(block, state):
        top, total, shift, acc = state
        stage = lax.rem(block - start, jnp.int32(STAGES))
        held = pages(block)
        plgpu.barrier_wait(filled.at[stage])
        _decode(keys, stage, None)
        slot = block * SLOTS + _iota(OF_ROWS)
        _decode(values, stage, (slot >= low) & (slot <= high) & _held(plan, held, OF_ROWS))
        plgpu.commit_smem()

        @pl.when(block + STAGES < end)
        def _next():
            copy(pages(block + STAGES), block + STAGES, stage)

        def dots(into):
            for place in range(plan.keys.places):
                plgpu.wgmma(into, q.at[place], key_values.at[place].transpose((1, 0)))
            return into[...]

        scores = pl.run_scoped(dots, plgpu.ACC((ROWS, SLOTS), jnp.float32))
        of_slots = functools.partial(_of_slots, row, head, block)
        if keys.factors is not None:
            scores = scores * _across(of_slots(keys.factors))
        if keys.shifts is not None:
            scores = scores + _down(sum_q, SLOTS) * _across(of_slots(keys.shifts))
        scores = plan.options.scores(scores)
        slot = block * SLOTS + plgpu.broadcasted_iota(jnp.int32, (ROWS, SLOTS), 1, layout=MATRIX)
        mine = plan.options.in_sight(_down(at, SLOTS), slot) & _across(_held(plan, held, OF_COLUMNS))
        higher = jnp.maximum(top, jnp.where(mine, scores, FLOOR).max(axis=1))
        fade = jnp.exp(top - higher)
        weight = jnp.where(mine, jnp.exp(scores - _down(higher, SLOTS)), 0.0)
        total = total * fade + weight.sum(axis=1)
        if values.shifts is not None:
            shift = shift * fade + (weight * _across(of_slots(values.shifts))).sum(axis=1)
        if values.factors is not None:
            weight = weight * _across(of_slots(values.factors))
        weights[0] = weight.astype(jnp.bfloat16)
        plgpu.commit_smem()
        out = []
        for place in range(plan.values.places):

            def weighed(into, place=place):
                plgpu.wgmma(into, weights.at[0], value_values.at[place])
                return into[...]

            width = plan.values.width
            more = pl.run_scoped(weighed, plgpu.ACC((ROWS, width), jnp.float32))
            out.append(acc[place] * _down(fade, width) + more)
        return higher, total, shift, tuple(out)

    def column(value):
        return plgpu.layout_cast(jnp.full((ROWS,), value, jnp.float32), OF_ROWS)

    zero = plgpu.layout_cast(jnp.zeros((ROWS, plan.values.width), jnp.float32), MATRIX)
    state = column(FLOOR), column(0.0), column(0.0), (zero,) * plan.values.places
    top, total, shift, acc = lax.fori_loop(start, end, step, state)
    tops[split, tile, head] = top
    totals[split, tile, head] = total
    for place, out in enumerate(acc):
        sums[split, tile, head, place] = out + _down(shift, plan.values.width)


def _pages(plan: Plan, table, row, block) -> list[tuple[Any, Any]]:
    """The physical page of each chunk of a block, and whether there is one."""
    found = []
    for chunk in range(SLOTS // plan.chunk):
        slot = block * SLOTS + chunk * plan.chunk
        page = table[row * plan.table_pages + lax.div(slot, jnp.int32(plan.keys.page_size))]
        found.append((page, (page >= 0) & (page < plan.options.num_pages)))
    return found


def _copy(plan: Plan, head, keys: Side, values: Side, filled, pages, block, stage) -> None:
    """Start the copies of a block; of "no page" that of page 0, which no query sees."""
    for chunk, (page, held) in enumerate(pages):
        at = jnp.where(held, page, 0)
        within = lax.rem(block * SLOTS + chunk * plan.chunk, jnp.int32(plan.keys.page_size))
        for side in (keys, values):
            plgpu.copy_gmem_to_smem(
                side.pool.at[head, at, pl.ds(within, plan.chunk)],
                side.buffer.at[stage, pl.ds(chunk * plan.chunk, plan.chunk)],
                filled.at[stage],
            )


def _decode(side: Side, stage, kept) -> None:
    """Lay a block down as bfloat16, with zeros in the slots that are not ``kept``."""
    stored = _load(side.buffer.at[stage], MATRIX)
    for place in range(side.layout.places):
        values = _values(side.layout, stored, place)
        if kept is not None:
            values = jnp.where(_down(kept, side.layout.width), values, jnp.zeros((), values.dtype))
        side.decoded[place] = values.astype(jnp.bfloat16)


def _values(layout: Pages, stored, place: int):
    if layout.quantizer is None:
        return stored
    codes = stored
    if layout.places > 1:
        bits, dtype = BITS // (4 * layout.places), layout.quantizer.code_dtype(layout.dtype)
        signed = jnp.issubdtype(dtype, jnp.signedinteger)
        high = lax.shift_left(stored.astype(jnp.int32), jnp.int32(BITS - bits * (place + 1)))
        down = lax.shift_right_arithmetic if signed else lax.shift_right_logical
        codes = down(high, jnp.int32(BITS - bits)).astype(dtype)
    return layout.quantizer.decode(codes, jnp.float32 if layout.groups else layout.dtype)


def _of_slots(row, head, block, parts):
    return _load(parts.at[row, head, pl.ds(block * SLOTS, SLOTS)], OF_COLUMNS)


def _load(ref, layout):
    return plgpu.load(ref, layout=layout, optimized=False)  # type: ignore[call-arg]  # JAX 0.10 has an index, too


def _held(plan: Plan, pages: list[tuple[Any, Any]], layout):
    """(slots,): whether the slot's page is there."""
    slot = _iota(layout)
    held = slot < SLOTS
    for chunk, (_, there) in reversed(list(enumerate(pages))):
        held = jnp.where(slot < (chunk + 1) * plan.chunk, there, held)
    return held


def _iota(layout):
    return plgpu.broadcasted_iota(jnp.int32, (SLOTS,), 0, layout=layout)


def _down(rows, width: int):
    """(rows,) as (rows, width)."""
    return lax.broadcast_in_dim(rows, (rows.shape[0], width), (0,))


def _across(columns):
    """(slots,) as (rows, slots)."""
    return lax.broadcast_in_dim(columns, (ROWS, columns.shape[0]), (1,))
