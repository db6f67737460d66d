"""The Pallas kernel of the ``tpu`` backend: one tile of queries after another, over blocks of pages.

A block's pages are copied from HBM one by one, as the page table in scalar memory says, all KV heads of a
page at once and into one of two buffers, while the block before is computed with from the other. While the
last block of a tile is computed with, the first one of the next tile arrives. The softmax is a running one
(Milakov and Gimelshein, 2018).
"""

import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from qpaged._compat import shaped_as
from qpaged.attention._options import FLOOR, Options
from qpaged.attention._tpu_pages import Pages

NT = (((1,), (1,)), ((), ()))  # (rows, lanes) . (slots, lanes)
NN = (((1,), (0,)), ((), ()))  # (rows, slots) . (slots, lanes)


@dataclass(frozen=True)
class Plan:
    """What is static of one call.

    Attributes:
        keys: how the pages of keys lie.
        values: how those of values do.
        options: of the attention.
        tiles: tiles of queries, each a step of the grid.
        tokens: queries of a tile.
        group: query heads of a KV head.
        pages: pages of a block.
        table_pages: pages of a row of the table, a multiple of ``pages``.
        shared: whether all tiles are of one sequence, the table's only row.
    """

    keys: Pages
    values: Pages
    options: Options
    tiles: int
    tokens: int
    group: int
    pages: int
    table_pages: int
    shared: bool

    @property
    def rows(self) -> int:
        """Query rows that one KV head serves in a tile."""
        return self.tokens * self.group

    @property
    def slots(self) -> int:
        """Slots of a block."""
        return self.pages * self.keys.page_size

    @property
    def blocks(self) -> int:
        """Blocks of a row of the table."""
        return self.table_pages // self.pages

    @property
    def scattered(self) -> bool:
        """Whether there may be slots that no query of a tile sees between some that one does."""
        return self.tokens > 1 and self.options.sliding_window is not None


class Pool(NamedTuple):
    """Keys, or values, in HBM.

    Attributes:
        pages: (kv_heads, pages, page_rows, lanes); codes, or floats.
        scales: (sequences, blocks, ...), as :meth:`Pages.scales_of` has them; None where there are none.
    """

    pages: Any
    scales: Any


class Buffers(NamedTuple):
    """What a pool comes to, on the chip: two blocks of pages and of scales, and what is made of one.

    Attributes:
        pages: (2, pages, kv_heads, page_rows, lanes).
        scales: (2, ...); a block's.
        arrived: two semaphores.
        factors: of each slot, where it has one; float32, fold by fold where they are the slot's own.
        shifts: likewise.
        seen: (rows, lanes) float32, 1 where a query of the tile sees the slot, if bounds do not say that.
    """

    pages: Any
    scales: Any
    arrived: Any
    factors: Any = None
    shifts: Any = None
    seen: Any = None

    @classmethod
    def of(cls, plan: "Plan", layout: Pages, pool: Pool) -> "Buffers":
        heads, _, *page = pool.pages.shape
        made = {}
        if layout.groups == 1:
            slots = plan.slots if layout.per_slot else plan.slots // layout.folds
            made["factors"] = pltpu.VMEM((heads, slots), jnp.float32)
            made["shifts"] = made["factors"] if layout.shifted else None
        if plan.scattered:
            made["seen"] = pltpu.VMEM((plan.slots // layout.folds, layout.lanes), jnp.float32)
        return cls(
            pltpu.VMEM((2, plan.pages, heads, *page), pool.pages.dtype),
            None if pool.scales is None else pltpu.VMEM((2, *pool.scales.shape[2:]), pool.scales.dtype),
            pltpu.SemaphoreType.DMA((2,)),
            **made,
        )


class State(NamedTuple):
    """What one block of a tile leaves to the next.

    Attributes:
        top: (kv_heads, rows, 1) float32, the highest score.
        total: (kv_heads, rows, 1) float32, the sum of the weights.
        acc: (kv_heads, places, rows, lanes) float32, that of the weighed values.
        position: (rows, 1) int32, of each query; the same for all blocks.
        done: (1,) int32, the blocks of all tiles so far; in scalar memory.
    """

    top: Any
    total: Any
    acc: Any
    position: Any
    done: Any


@dataclass(frozen=True)
class Side:
    """Keys, or values: how they lie, where they are, and where they come to."""

    layout: Pages
    pool: Pool
    buffers: Buffers

    def page_copy(self, page: Any, half: Any, place: Any) -> Any:
        arrived = self.buffers.arrived.at[half]
        return pltpu.make_async_copy(self.pool.pages.at[:, page], self.buffers.pages.at[half, place], arrived)

    def scale_copies(self, row: Any, block: Any, half: Any) -> Iterator[Any]:
        if self.pool.scales is not None:
            buffer, arrived = self.buffers.scales.at[half], self.buffers.arrived.at[half]
            yield pltpu.make_async_copy(self.pool.scales.at[row, block], buffer, arrived)

    def spread_scales(self, plan: "Plan", half: Any) -> None:
        """Make the factors and shifts of a block's slots, where they have one each."""
        layout, buffers = self.layout, self.buffers
        for made, buffer in ((layout.factors, buffers.factors), (layout.shifts, buffers.shifts)):
            if buffer is not None:
                parts = made(buffers.scales[half])
                buffer[...] = parts if layout.per_slot else _dot(parts, layout.rows_of_pages(plan.pages), NN)

    def of_slots(self, parts: Any, head: Any, fold: int) -> jax.Array:
        """(1, rows) of a head's factors or shifts."""
        if not self.layout.per_slot:
            return parts[pl.ds(head, 1)]
        rows = parts.shape[1] // self.layout.folds
        return parts[pl.ds(head, 1)][:, fold * rows : (fold + 1) * rows]

    def values(self, half: Any, head: Any, dtype: Any, kept: Any) -> tuple[list[jax.Array], jax.Array | None]:
        """For each place a head's values (rows, lanes), zeros where not ``kept``; and the stored scales that
        they are multiplied by, where there are several along the channels."""
        stored = self.buffers.pages[half, :, head]
        made = dtype if kept is None else jnp.float32  # whose lanes the mask's are
        if self.layout.groups > 1:
            scales = self.buffers.scales[half, head]
            values = self.layout.scaled(stored, scales, made)
        else:
            scales, values = None, self.layout.decoded(stored, made)
        return [x if kept is None else jnp.where(kept, x, 0.0).astype(dtype) for x in values], scales


def attend(plan: Plan, bounds, position, table, query, sinks, keys: Pool, values: Pool):
    """Outputs (tiles, kv_heads, places, rows, lanes) float32.

    Args:
        bounds: (2 · tiles,) int32; of each tile the first and the last slot that any query sees; 0 and -1
            where none does.
        position: (tiles · tokens,) int32.
        table: (sequences · table_pages,) int32.
        query: (tiles, kv_heads, places, rows, lanes).
        sinks: (kv_heads, rows, 1) float32 or None.
    """
    heads, pools, layouts = keys.pages.shape[0], (keys, values), (plan.keys, plan.values)
    out_shape = heads, plan.values.places, plan.rows, plan.values.lanes
    column = pltpu.VMEM((heads, plan.rows, 1), jnp.float32)
    state = State(
        column, column, pltpu.VMEM(out_shape, jnp.float32), pltpu.VMEM((plan.rows, 1), jnp.int32),
        pltpu.SMEM((1,), jnp.int32),
    )  # fmt: skip
    inputs = query, sinks, pools
    in_hbm = jax.tree_util.tree_map(lambda _: pl.BlockSpec(memory_space=pl.ANY), pools)
    each = None if sinks is None else pl.BlockSpec(sinks.shape, lambda tile, *_: (0, 0, 0))
    return pl.pallas_call(
        functools.partial(_kernel, plan),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(plan.tiles,),
            in_specs=(_per_tile(query.shape), each, in_hbm),
            out_specs=_per_tile((plan.tiles, *out_shape)),
            scratch_shapes=(
                tuple(Buffers.of(plan, *side) for side in zip(layouts, pools, strict=True)),
                state,
            ),
        ),
        out_shape=shaped_as((plan.tiles, *out_shape), jnp.float32, (bounds, position, table, inputs)),
        name="paged_attention",
    )(bounds, position, table, *inputs)


def _per_tile(shape: tuple[int, ...]) -> pl.BlockSpec:
    return pl.BlockSpec((1, *shape[1:]), lambda tile, *_: (tile, *[0] * (len(shape) - 1)))


def _kernel(plan: Plan, bounds, position, table, query, sinks, pools, out, buffers, state: State) -> None:
    layouts = plan.keys, plan.values
    keys, values = sides = [Side(*parts) for parts in zip(layouts, pools, buffers, strict=True)]
    tile = pl.program_id(0)

    def span(tile):
        first = lax.div(bounds[2 * tile], plan.slots)
        return first, jnp.maximum(lax.div(bounds[2 * tile + 1], plan.slots), first) + 1

    copies = functools.partial(_copies, plan, bounds, table, keys, values)
    first, end = span(tile)

    @pl.when(tile == 0)
    def first_copies():
        state.done[0] = 0
        copies(tile, first, 0, start=True)

    _begin(plan, position, sinks, state)

    def step(block, _):
        half = lax.rem(state.done[0], 2)
        more = block + 1 < end
        after = jnp.where(more, tile, jnp.minimum(tile + 1, plan.tiles - 1))
        block_after = jnp.where(more, block + 1, span(after)[0])

        @pl.when(more | (tile + 1 < plan.tiles))
        def next_copies():
            copies(after, block_after, 1 - half, start=True)

        copies(tile, block, half, start=False)
        for side in sides:
            side.spread_scales(plan, half)
            _find_seen(plan, side, block, position)
        held = _held_slots(plan, bounds, table, tile, block)
        limits = bounds[2 * tile], bounds[2 * tile + 1]
        head = functools.partial(_head, plan, block, half, held, limits, query, keys, values, state)
        lax.fori_loop(0, state.top.shape[0], lambda index, _: head(index), None)
        state.done[0] += 1

    lax.fori_loop(first, end, step, None)
    weight = jnp.where(state.total[...] > 0, state.total[...], 1)
    out[0] = state.acc[...] / weight[:, None]


def _begin(plan: Plan, positions, sinks, state: State) -> None:
    """The state before a tile's first block."""
    of_row = lax.div(lax.broadcasted_iota(jnp.int32, (plan.rows, 1), 0), plan.group)
    state.position[...] = _positions(plan, positions, of_row)
    state.acc[...] = jnp.zeros(state.acc.shape, jnp.float32)
    if sinks is None:
        state.top[...] = jnp.full(state.top.shape, FLOOR, jnp.float32)
        state.total[...] = jnp.zeros(state.total.shape, jnp.float32)
    else:
        state.top[...] = sinks[...]
        state.total[...] = jnp.ones(state.total.shape, jnp.float32)


def _positions(plan: Plan, positions, token) -> jax.Array:
    """The position of each ``token`` (any shape) of this tile."""
    first = pl.program_id(0) * plan.tokens

    def one(index, found):
        return jnp.where(token == index, positions[first + index], found)

    return lax.fori_loop(0, plan.tokens, one, jnp.full(token.shape, -1, jnp.int32))


def _find_seen(plan: Plan, side: Side, block, positions) -> None:
    """Mark a block's slots that any query of the tile sees, where bounds do not say it."""
    seen, layout = side.buffers.seen, side.layout
    if seen is None:
        return
    position = _positions(plan, positions, lax.broadcasted_iota(jnp.int32, (1, plan.tokens), 1))
    row = lax.broadcasted_iota(jnp.int32, (len(seen), 1), 0)
    found = jnp.zeros(seen.shape, jnp.float32)
    for fold in range(layout.folds):
        slot = block * plan.slots + row * layout.folds + fold
        any_query = jnp.where(plan.options.in_sight(position, slot), 1.0, 0.0).max(axis=1, keepdims=True)
        found += layout.fold(jnp.broadcast_to(any_query, seen.shape), fold)
    seen[...] = found


def _kept(plan: Plan, side: Side, block, limits) -> jax.Array:
    """(rows, lanes): which elements of a block no query's weights make harmless, NaN as they may be."""
    if side.buffers.seen is not None:
        return side.buffers.seen[...] > 0
    slot = block * plan.slots + side.layout.slots(plan.slots // side.layout.folds)
    return (slot >= limits[0]) & (slot <= limits[1])


def _page(plan: Plan, bounds, table, tile, page) -> tuple[Any, Any]:
    """The physical page of a tile's logical one, and whether it is there and any query sees it."""
    row = 0 if plan.shared else tile
    at = table[row * plan.table_pages + page]
    size = plan.keys.page_size
    seen = (page >= lax.div(bounds[2 * tile], size)) & (page * size <= bounds[2 * tile + 1])
    return at, seen & (at >= 0) & (at < plan.options.num_pages)


def _copies(plan: Plan, bounds, table, keys: Side, values: Side, tile, block, half, start: bool) -> None:
    """Start, or wait for, the copies of a block. Values that are not copied are zeros."""
    act: Callable[[Any], None] = (lambda copy: copy.start()) if start else (lambda copy: copy.wait())

    def page(place, _):
        at, held = _page(plan, bounds, table, tile, block * plan.pages + place)

        @pl.when(held)
        def copy():
            for side in (keys, values):
                act(side.page_copy(at, half, place))

        if start:

            @pl.when(jnp.logical_not(held))
            def clear():
                pages = values.buffers.pages
                pages[half, place] = jnp.zeros(pages.shape[2:], pages.dtype)

    row = 0 if plan.shared else tile
    for side in (keys, values):
        for copy in side.scale_copies(row, block, half):
            act(copy)
    lax.fori_loop(0, plan.pages, page, None)


def _held_slots(plan: Plan, bounds, table, tile, block) -> jax.Array:
    """(1, rows of a block): whether the row's page was copied."""
    shape = 1, plan.pages * plan.keys.page_rows
    of_row = lax.div(lax.broadcasted_iota(jnp.int32, shape, 1), plan.keys.page_rows)

    def page(place, held):
        _, copied = _page(plan, bounds, table, tile, block * plan.pages + place)
        return jnp.where(of_row == place, copied.astype(jnp.int32), held)

    return lax.fori_loop(0, plan.pages, page, jnp.zeros(shape, jnp.int32)) > 0


def _head(plan: Plan, block, half, held, limits, query, keys: Side, values: Side, state: State, head) -> None:
    """One KV head's part of one block: its scores, and its weights times values."""
    dtype = query.dtype
    # Where slots share a row, a NaN in one would reach the score of another.
    kept = _kept(plan, keys, block, limits) if plan.keys.folds > 1 else None
    scores = _scores(plan, half, head, query, keys, kept)
    seen = []
    for fold in range(plan.keys.folds):
        slot = lax.broadcasted_iota(jnp.int32, scores[fold].shape, 1) * plan.keys.folds + fold
        seen.append(plan.options.in_sight(state.position[...], block * plan.slots + slot) & held)

    top = higher = state.top[head]
    for s, mine in zip(scores, seen, strict=True):
        higher = jnp.maximum(higher, jnp.where(mine, s, FLOOR).max(axis=1, keepdims=True))
    fade = jnp.exp(top - higher)
    weights = [
        jnp.where(mine, jnp.exp(s - higher), 0.0).astype(dtype) for s, mine in zip(scores, seen, strict=True)
    ]
    state.top[head] = higher
    added = _sum(w.astype(jnp.float32).sum(axis=1, keepdims=True) for w in weights)
    state.total[head] = state.total[head] * fade + added
    weighed = _weighed(plan, half, head, _refolded(plan, weights), values, _kept(plan, values, block, limits))
    for place, out in enumerate(weighed):
        state.acc[head, place] = state.acc[head, place] * fade + out


def _scores(plan: Plan, half, head, query, keys: Side, kept) -> list[jax.Array]:
    """For each fold the scores (queries, rows)."""
    layout, factors, shifts = plan.keys, keys.buffers.factors, keys.buffers.shifts
    k, scales = keys.values(half, head, query.dtype, kept)
    queries = [query[0, head, place] for place in range(layout.places)]
    of_pages = None
    if scales is not None and layout.shifted:  # the same for each fold
        of_pages = _sum(
            _dot(layout.fold(q, 0).astype(jnp.float32), layout.shift_rows(scales, place), NT)
            for place, q in enumerate(queries)
        )
        of_pages = _dot(of_pages, layout.rows_of_pages(plan.pages), NN)
    scores = []
    for fold in range(layout.folds):
        mine = [layout.fold(q, fold) for q in queries]
        dots = _sum(_dot(q, rows, NT) for q, rows in zip(mine, k, strict=True))
        if factors is not None:
            dots = dots * keys.of_slots(factors, head, fold)
        if shifts is not None:
            summed = _sum(q.astype(jnp.float32).sum(axis=1, keepdims=True) for q in mine)
            dots = dots + summed * keys.of_slots(shifts, head, fold)
        scores.append(plan.options.scores(dots if of_pages is None else dots + of_pages))
    return scores


def _refolded(plan: Plan, weights: list[jax.Array]) -> list[jax.Array]:
    """The weights of the keys' folds (queries, rows) as those of the values'."""
    mine, wanted = plan.keys.folds, plan.values.folds
    if mine == wanted:
        return weights
    joined = jnp.concatenate(weights, axis=1)
    shape = plan.slots, plan.slots // wanted
    row, column = (lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1))
    slot = lax.rem(row, plan.slots // mine) * mine + lax.div(row, plan.slots // mine)
    picks = [(slot == column * wanted + fold).astype(joined.dtype) for fold in range(wanted)]
    return [_dot(joined, pick, NN).astype(joined.dtype) for pick in picks]


def _weighed(plan: Plan, half, head, weights, values: Side, kept) -> list[jax.Array]:
    """For each place the sums (queries, lanes) of values times weights."""
    layout, dtype = plan.values, weights[0].dtype
    factors, shifts = values.buffers.factors, values.buffers.shifts
    v, scales = values.values(half, head, dtype, kept)
    out = [jnp.zeros((plan.rows, layout.lanes), jnp.float32) for _ in v]
    for fold, w in enumerate(weights):
        wide = w.astype(jnp.float32)
        if factors is not None:
            w = (wide * values.of_slots(factors, head, fold)).astype(dtype)
        added = [_dot(w, rows, NN) for rows in v]
        if shifts is not None:
            shift = (wide * values.of_slots(shifts, head, fold)).sum(axis=1, keepdims=True)
            added = [part + shift for part in added]
        if scales is not None and layout.shifted:
            of_pages = _dot(wide, layout.rows_of_pages(plan.pages), NT)
            added = [
                part + _dot(of_pages, layout.shift_rows(scales, place), NN)
                for place, part in enumerate(added)
            ]
        out = [o + layout.fold(part, fold) for o, part in zip(out, added, strict=True)]
    return out


def _sum(parts: Iterable[jax.Array]) -> jax.Array:
    return functools.reduce(jnp.add, parts)


def _dot(lhs: jax.Array, rhs: jax.Array, numbers: Any) -> jax.Array:
    precision = lax.Precision.HIGHEST if lhs.dtype == jnp.float32 else None
    return lax.dot_general(lhs, rhs, numbers, precision=precision, preferred_element_type=jnp.float32)
