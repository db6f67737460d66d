"""The Mosaic GPU kernel of the ``gpu`` backend: a tile of query rows over one share of its sequence.

A program of the grid is one warpgroup. It copies blocks of 64 slots of one KV head from the pool, as the page
table says, and the scales of their slots, into one of several buffers, while it computes with another. Codes
are decoded in registers and laid down as bfloat16 for the tensor cores, slots in their 64 rows and queries in
their columns, so that few queries cost little; scales are applied to the scores and to the weights. What the
shares of a sequence come to is merged by the caller (Dao et al., Flash-Decoding, 2023).
"""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from qpaged.attention._layout import Layout
from qpaged.attention._options import FLOOR, Options

SLOTS = 64  # of a block: the rows that the tensor cores take at once
BUFFERS = (
    3 * 2**14
)  # bytes of the buffers, if they hold two blocks: three programs then share a multiprocessor
MATRIX = plgpu.Layout.WGMMA
TRANSPOSED = plgpu.Layout.WGMMA_TRANSPOSED
OF_SLOTS, OF_QUERIES = MATRIX.reduce(1), MATRIX.reduce(0)


@dataclass(frozen=True)
class Plan:
    """What is static of one call.

    Attributes:
        keys: how the pages of keys lie.
        values: how those of values do.
        options: of the attention.
        tiles: tiles of query rows.
        rows: of a tile, a multiple of 8.
        splits: shares of a sequence, each a program of its own.
        table_pages: pages of a row of the table, whole blocks of them.
        shared: whether all tiles are of one sequence, the table's only row.
    """

    keys: Layout
    values: Layout
    options: Options
    tiles: int
    rows: int
    splits: int
    table_pages: int
    shared: bool

    @property
    def stages(self) -> int:
        """Blocks that the buffers hold."""
        block = SLOTS * (self.keys.stored_bytes + self.values.stored_bytes)
        return max(2, min(6, BUFFERS // block))

    @property
    def chunk(self) -> int:
        """Slots that one copy brings: a page, or a block's part of one."""
        return min(self.keys.page_size, SLOTS)

    @property
    def chunks(self) -> range:
        """Of a block."""
        return range(SLOTS // self.chunk)


@dataclass(frozen=True)
class Side:
    """The references of keys, or of values: the pool, its scales, and the buffers of both."""

    layout: Layout
    pool: Any
    scales: Any
    buffer: Any
    scale_buffer: Any

    def place(self, place: int) -> Any:
        """The columns of what is laid down that a place of a byte has."""
        return pl.ds(place * self.layout.width, self.layout.width)

    @property
    def per_page(self) -> bool:
        return self.scales is not None and not self.layout.per_slot


def attend(plan: Plan, bounds, position, table, query, summed, keys, values, scales):
    """Sums (splits, tiles, kv_heads, head_dim, rows), tops and totals (splits, tiles, kv_heads, rows).

    All float32, and not yet divided: a sum is one of values times exp(score - top). Channels come place by
    place.

    Args:
        bounds: (2 · tiles,) int32; of each tile the first and the last slot that any query sees; 0 and -1
            where none does.
        position: (tiles, rows) int32.
        table: (sequences · table_pages,) int32.
        query: (tiles, kv_heads, places, rows, width) bfloat16.
        summed: (tiles, kv_heads, rows) float32, each row of the query summed up.
        keys, values: (kv_heads, pages, page_size, width); codes, or floats.
        scales: of keys and of values, as stored, (kv_heads, pages) or (kv_heads, pages, page_size); or None.
    """
    heads, head_dim = keys.shape[0], plan.values.head_dim
    rows = jax.ShapeDtypeStruct((plan.splits, plan.tiles, heads, plan.rows), jnp.float32)
    sums = jax.ShapeDtypeStruct((plan.splits, plan.tiles, heads, head_dim, plan.rows), jnp.float32)
    row = min(64, plan.keys.width, plan.values.width)
    scratch = [
        _tiled((plan.keys.places, plan.rows, plan.keys.width), jnp.bfloat16, row),
        _tiled((plan.rows, SLOTS), jnp.bfloat16, row),
        _tiled((SLOTS, head_dim), jnp.bfloat16, row),
    ]
    copies = 0
    for layout, pool, scale in zip((plan.keys, plan.values), (keys, values), scales, strict=True):
        scratch.append(_tiled((plan.stages, SLOTS, layout.width), pool.dtype))
        copies += 1
        if scale is not None and layout.per_slot:
            scratch.append(plgpu.SMEM((plan.stages, SLOTS), scale.dtype))
            copies += 1
    arrivals = copies * len(plan.chunks)
    scratch += [
        plgpu.Barrier(num_arrivals=plan.keys.places),
        plgpu.Barrier(num_arrivals=arrivals, num_barriers=plan.stages),
    ]
    return plgpu.kernel(
        functools.partial(_kernel, plan, [scale is not None for scale in scales]),
        out_type=(sums, rows, rows),
        scratch_types=scratch,
        grid=(plan.tiles, heads, plan.splits),
        grid_names=("tile", "head", "split"),
    )(bounds, position, table, query, summed, keys, values, *(scale for scale in scales if scale is not None))


def _tiled(shape: tuple[int, ...], dtype: Any, row: int | None = None) -> Any:
    """Shared memory in rows of at most 128 bytes, each 8 of which are shifted against each other."""
    size = jnp.dtype(dtype).itemsize
    row = min(128 // size, shape[-1]) if row is None else row
    transforms = plgpu.TilingTransform((8, row)), plgpu.SwizzleTransform(row * size)
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def _kernel(plan: Plan, scaled: list[bool], *refs: Any) -> None:
    given = iter(refs)
    bounds, position, table, query, summed, *pools = (next(given) for _ in range(7))
    scales = [next(given) if there else None for there in scaled]
    sums, tops, totals, q, weights, laid = (next(given) for _ in range(6))
    sides = []
    for layout, pool, scale in zip((plan.keys, plan.values), pools, scales, strict=True):
        per_slot = scale is not None and layout.per_slot
        sides.append(Side(layout, pool, scale, next(given), next(given) if per_slot else None))
    ready, filled = given
    keys, values = sides
    tile, head, split = (lax.axis_index(name) for name in ("tile", "head", "split"))
    for place in range(plan.keys.places):
        plgpu.copy_gmem_to_smem(query.at[tile, head, place], q.at[place], ready)
    low, high = bounds[2 * tile], bounds[2 * tile + 1]
    row = jnp.int32(0) if plan.shared else tile
    first = lax.div(low, jnp.int32(SLOTS))
    blocks = lax.div(high + jnp.int32(SLOTS), jnp.int32(SLOTS)) - first  # none where high is -1
    share = lax.div(blocks + jnp.int32(plan.splits - 1), jnp.int32(plan.splits))
    start = first + split * share
    end = jnp.minimum(start + share, first + blocks)
    copy = functools.partial(_copy, plan, head, sides, filled)

    def found(block):
        """The pages of a block, and the scales of these that are one for a page."""
        pages = _pages(plan, table, row, jnp.maximum(jnp.minimum(block, end - 1), 0))
        return pages, tuple(_of_pages(side, head, plan, pages) for side in sides)

    for stage in range(plan.stages):

        @pl.when(start + stage < end)
        def _first(stage=stage):
            copy(_pages(plan, table, row, start + stage), start + stage, jnp.int32(stage))

    plgpu.barrier_wait(ready)
    at = _load(position.at[tile], OF_QUERIES)
    sum_q = _load(summed.at[tile, head], OF_QUERIES)

    def step(block, state):
        top, total, shift, acc, (pages, of_pages) = state
        stage = lax.rem(block - start, jnp.int32(plan.stages))
        following = found(block + 1)  # loaded while this block is computed with
        plgpu.barrier_wait(filled.at[stage])

        _lay_down(keys, stage, laid)
        plgpu.commit_smem()

        def dots(into):
            for place in range(keys.layout.places):
                plgpu.wgmma(into, laid.at[:, keys.place(place)], q.at[place].transpose((1, 0)))
            return into[...]

        scores = pl.run_scoped(dots, plgpu.ACC((SLOTS, plan.rows), jnp.float32))
        k_factor, k_shift = _factors(keys, plan, stage, of_pages[0])
        v_factor, v_shift = _factors(values, plan, stage, of_pages[1])
        if k_factor is not None:
            scores = scores * _along(k_factor, plan.rows)
        if k_shift is not None:
            scores = scores + _down(sum_q) * _along(k_shift, plan.rows)
        scores = plan.options.scores(scores)
        held = _held(plan, pages)
        slot = block * SLOTS + plgpu.broadcasted_iota(jnp.int32, (SLOTS, plan.rows), 0, layout=MATRIX)
        mine = plan.options.in_sight(_down(at), slot) & _along(held, plan.rows)
        higher = jnp.maximum(top, jnp.where(mine, scores, FLOOR).max(axis=0))
        fade = jnp.exp(top - higher)
        weight = jnp.where(mine, jnp.exp(scores - _down(higher)), 0.0)
        total = total * _down(fade) + weight
        if v_shift is not None:
            shift = shift * _down(fade) + jnp.where(mine, weight * _along(v_shift, plan.rows), 0.0)
        if v_factor is not None:
            weight = jnp.where(mine, weight * _along(v_factor, plan.rows), 0.0)
        weights.transpose((1, 0))[...] = plgpu.layout_cast(weight.astype(jnp.bfloat16), TRANSPOSED)
        slot = block * SLOTS + _iota()
        kept = (slot >= low) & (slot <= high) & held

        whole = (block * SLOTS >= low) & (block * SLOTS + SLOTS - 1 <= high)
        for page in pages:
            whole &= _there(plan, page)[0]
        pl.when(whole)(lambda: _lay_down(values, stage, laid))
        pl.when(~whole)(lambda: _lay_down(values, stage, laid, kept))
        plgpu.commit_smem()

        @pl.when(block + plan.stages < end)
        def _next():
            copy(_pages(plan, table, row, block + plan.stages), block + plan.stages, stage)

        def weighed(into):
            plgpu.wgmma(into, laid.transpose((1, 0)), weights.transpose((1, 0)))
            return into[...]

        more = pl.run_scoped(weighed, plgpu.ACC(acc.shape, jnp.float32))
        return higher, total, shift, acc * _down(fade, len(acc)) + more, following

    def zeros(rows):
        return plgpu.layout_cast(jnp.zeros((rows, plan.rows), jnp.float32), MATRIX)

    floor = plgpu.layout_cast(jnp.full((plan.rows,), FLOOR, jnp.float32), OF_QUERIES)
    state = floor, zeros(SLOTS), zeros(SLOTS), zeros(plan.values.head_dim), found(start)
    top, total, shift, acc, _ = lax.fori_loop(start, end, step, state)
    _store(tops.at[split, tile, head], top)
    _store(totals.at[split, tile, head], total.sum(axis=0))
    if values.layout.shifted:
        acc = acc + _down(shift.sum(axis=0), len(acc))
    _store(sums.at[split, tile, head], acc)


def _pages(plan: Plan, table, row, block) -> tuple[Any, ...]:
    """The physical page of each chunk of a block."""
    size = jnp.int32(plan.keys.page_size)
    slots = [block * SLOTS + chunk * plan.chunk for chunk in plan.chunks]
    return tuple(table[row * plan.table_pages + lax.div(slot, size)] for slot in slots)


def _there(plan: Plan, page):
    """Whether there is such a page, and the page; or page 0, which no query sees."""
    there = (page >= 0) & (page < plan.options.num_pages)
    return there, jnp.where(there, page, 0)


def _of_pages(side: Side, head, plan: Plan, pages) -> tuple[Any, ...]:
    """The stored scales of pages, if a page has its own."""
    if not side.per_page:
        return ()
    scales = (side.scales[head, _there(plan, page)[1]] for page in pages)
    return tuple(scale.astype(_wide(scale.dtype)) for scale in scales)


def _copy(plan: Plan, head, sides: list[Side], filled, pages, block, stage) -> None:
    """Start the copies of a block, all from one warp, so that the others need not wait for each."""

    def start(page, chunk):
        at, within = _there(plan, page)[1], lax.rem(block * SLOTS + chunk * plan.chunk, plan.keys.page_size)
        part, to = pl.ds(within, plan.chunk), pl.ds(chunk * plan.chunk, plan.chunk)
        for side in sides:
            plgpu.copy_gmem_to_smem(side.pool.at[head, at, part], side.buffer.at[stage, to], filled.at[stage])
            if side.scale_buffer is not None:
                scales = side.scale_buffer.at[stage, to]
                plgpu.copy_gmem_to_smem(side.scales.at[head, at, part], scales, filled.at[stage])

    @plgpu.warp_map
    def _start(warp):
        @pl.when(warp == 0)
        def _all():
            for chunk, page in enumerate(pages):
                start(page, chunk)


def _lay_down(side: Side, stage, laid, kept=None) -> None:
    """Lay down a block as bfloat16, in units of its scales, with zeros in the slots that are not ``kept``."""
    stored = side.buffer[stage]
    for place in range(side.layout.places):
        values = _values(side.layout, stored, place).astype(jnp.bfloat16)
        if kept is not None:
            values = jnp.where(_along(kept, side.layout.width), values, jnp.zeros((), values.dtype))
        laid[:, side.place(place)] = values


def _values(layout: Layout, stored, place: int):
    if layout.quantizer is None:
        return stored
    codes = layout.codes(stored, place)
    return layout.quantizer.decode(codes, _decoding_dtype(layout.quantizer, codes))


def _decoding_dtype(quantizer: Any, codes) -> Any:
    """bfloat16, in which values are exact; float32 if they come from fp8, which converts to nothing else."""
    code = jax.ShapeDtypeStruct(codes.shape, codes.dtype)
    eqns = jax.make_jaxpr(lambda codes: quantizer.decode(codes, jnp.bfloat16))(code).eqns
    dtypes = [out.aval.dtype for eqn in eqns for out in eqn.outvars]
    narrow = any(jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize == 1 for dtype in dtypes)
    return jnp.float32 if narrow else jnp.bfloat16


def _factors(side: Side, plan: Plan, stage, of_pages) -> tuple[Any, Any]:
    """The factors of a block's slots and what is added to them, (slots,) float32 each, or None."""
    if side.scales is None:
        return None, None
    if side.per_page:
        scales = _spread(plan, of_pages).astype(side.scales.dtype)
    else:
        scales = _load(side.scale_buffer.at[stage], OF_SLOTS)
    quantizer = side.layout.quantizer
    return quantizer.multiplier(scales), quantizer.shift(scales) if side.layout.shifted else None


def _wide(dtype: Any) -> Any:
    """Integers of 32 bits, which alone the kernel calculates with."""
    return jnp.int32 if jnp.issubdtype(dtype, jnp.integer) else dtype


def _held(plan: Plan, pages):
    """(slots,): whether the slot's page is there."""
    return _spread(plan, [_there(plan, page)[0].astype(jnp.int32) for page in pages]) > 0


def _spread(plan: Plan, of_chunks):
    """(slots,), each with the value of its chunk."""
    slot, spread = _iota(), jnp.zeros((), of_chunks[0].dtype)
    for chunk in reversed(plan.chunks):
        spread = jnp.where(slot < (chunk + 1) * plan.chunk, of_chunks[chunk], spread)
    return spread


def _load(ref, layout):
    return plgpu.load(ref, layout=layout, optimized=False)  # type: ignore[call-arg]  # JAX 0.10 has an index, too


def _store(ref, value) -> None:
    if hasattr(plgpu, "store"):  # since JAX 0.12, where an assignment takes whole lines of 128 bytes alone
        plgpu.store(ref, value, optimized=False)
    else:
        ref[...] = value


def _iota():
    return plgpu.broadcasted_iota(jnp.int32, (SLOTS,), 0, layout=OF_SLOTS)


def _along(slots, width: int):
    """(slots,) as (slots, width)."""
    return lax.broadcast_in_dim(slots, (SLOTS, width), (0,))


def _down(queries, rows: int = SLOTS):
    """(queries,) as (rows, queries)."""
    return lax.broadcast_in_dim(queries, (rows, queries.shape[0]), (1,))
