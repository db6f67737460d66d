"""The Pallas kernel of the ``tpu`` backend: one tile of queries after another, over blocks of pages.

A block's pages are copied from HBM one by one, as the page table in scalar memory says, all KV heads of a
page at once and into one of two buffers, while the block before is computed with from the other. While the
last block of a tile is computed with, the first one of the next tile arrives. The softmax is a running one
(Milakov and Gimelshein, 2018).
"""

import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

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


@dataclass(frozen=True)
class Side:
    """The references of keys, or of values: their pages and scales in HBM, and the buffers they come to."""

    layout: Pages
    pool: Any
    scales: Any
    buffer: Any
    scale_buffer: Any
    semaphore: Any
    factors: Any
    shifts: Any

    def page_copy(self, page: Any, half: Any, place: Any) -> Any:
        return pltpu.make_async_copy(
            self.pool.at[:, page], self.buffer.at[half, place], self.semaphore.at[half]
        )

    def scale_copies(self, row: Any, block: Any, half: Any) -> Iterator[Any]:
        if self.scales is not None:
            yield pltpu.make_async_copy(
                self.scales.at[row, block], self.scale_buffer.at[half], self.semaphore.at[half]
            )

    def spread_scales(self, half: Any) -> None:
        """Make the factors and shifts of a block's slots, where they have one each."""
        if self.factors is not None:
            self.factors[...] = self.layout.factors(self.scale_buffer[half])
        if self.shifts is not None:
            self.shifts[...] = self.layout.shifts(self.scale_buffer[half])

    def of_slots(self, parts: Any, head: Any, fold: int) -> jax.Array:
        """(1, rows) of a head's factors or shifts."""
        rows = parts.shape[1] // self.layout.folds
        return parts[pl.ds(head, 1)][:, fold * rows : (fold + 1) * rows]

    def scales_of(self, half: Any, head: Any) -> jax.Array | None:
        """A head's stored scales, where there are several along the channels."""
        return self.scale_buffer[half, head] if self.layout.groups > 1 else None


def attend(plan: Plan, bounds, position, table, query, sinks, keys, values, key_scales, value_scales):
    """Outputs (tiles, kv_heads, places, rows, lanes) float32.

    Args:
        bounds: (2 · tiles,) int32; of each tile the first and the last slot that any query sees; 0 and -1
            where none does.
        position: (tiles · tokens,) int32.
        table: (sequences · table_pages,) int32.
        query: (tiles, kv_heads, places, rows, lanes).
        sinks: (kv_heads, rows, 1) float32 or None.
        keys, values: (kv_heads, pages, page_rows, lanes); codes, or floats.
        key_scales, value_scales: (sequences, blocks, ...), or None; stored scales, as
            :meth:`Pages.scales_of` has them.
    """
    heads = keys.shape[0]
    sides = [(plan.keys, keys, key_scales), (plan.values, values, value_scales)]
    per_tile = pl.BlockSpec((1, *query.shape[1:]), lambda tile, *_: (tile, 0, 0, 0, 0))
    out_shape = (plan.tiles, heads, plan.values.places, plan.rows, plan.values.lanes)
    in_specs, inputs = [per_tile], [query]
    if sinks is not None:
        in_specs, inputs = [*in_specs, pl.BlockSpec(sinks.shape, lambda tile, *_: (0, 0, 0))], [query, sinks]
    scratch = []
    for layout, pool, scales in sides:
        whole = [pool] if scales is None else [pool, scales]
        in_specs += [pl.BlockSpec(memory_space=pl.ANY)] * len(whole)
        inputs += whole
        scratch.append(pltpu.VMEM((2, plan.pages, heads, *pool.shape[2:]), pool.dtype))
        if scales is not None:
            scratch.append(pltpu.VMEM((2, *scales.shape[2:]), scales.dtype))
        scratch.append(pltpu.SemaphoreType.DMA((2,)))
        if layout.groups == 1:
            scratch += [pltpu.VMEM(scales.shape[2:], jnp.float32)] * (1 + layout.shifted)
    column = pltpu.VMEM((heads, plan.rows, 1), jnp.float32)
    scratch += [
        pltpu.VMEM((plan.rows, 1), jnp.int32),
        column,
        column,
        pltpu.VMEM(out_shape[1:], jnp.float32),
        pltpu.SMEM((1,), jnp.int32),
    ]
    return pl.pallas_call(
        functools.partial(_kernel, plan, sinks is not None),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(plan.tiles,),
            in_specs=in_specs,
            out_specs=pl.BlockSpec((1, *out_shape[1:]), lambda tile, *_: (tile, 0, 0, 0, 0)),
            scratch_shapes=scratch,
        ),
        out_shape=shaped_as(out_shape, jnp.float32, (bounds, position, table, inputs)),
        name="paged_attention",
    )(bounds, position, table, *inputs)


def _kernel(plan: Plan, has_sinks: bool, *refs: Any) -> None:
    take = iter(refs)
    bounds, positions, table, query = (next(take) for _ in range(4))
    sinks = next(take) if has_sinks else None
    layouts = plan.keys, plan.values
    hbm = [(next(take), next(take) if layout.groups else None) for layout in layouts]
    out = next(take)
    keys, values = (
        Side(
            layout, *pools,
            next(take), next(take) if layout.groups else None, next(take),
            next(take) if layout.groups == 1 else None,
            next(take) if layout.groups == 1 and layout.shifted else None,
        )
        for layout, pools in zip(layouts, hbm, strict=True)
    )  # fmt: skip
    position, top, total, acc, done = take
    tile = pl.program_id(0)

    def span(tile):
        first = lax.div(bounds[2 * tile], plan.slots)
        return first, jnp.maximum(lax.div(bounds[2 * tile + 1], plan.slots), first) + 1

    copies = functools.partial(_copies, plan, bounds, table, keys, values)
    first, end = span(tile)

    @pl.when(tile == 0)
    def first_copies():
        done[0] = 0
        copies(tile, first, 0, start=True)

    _begin(plan, positions, sinks, position, top, total, acc)

    def step(block, _):
        half = lax.rem(done[0], 2)
        more = block + 1 < end
        after = jnp.where(more, tile, jnp.minimum(tile + 1, plan.tiles - 1))
        block_after = jnp.where(more, block + 1, span(after)[0])

        @pl.when(more | (tile + 1 < plan.tiles))
        def next_copies():
            copies(after, block_after, 1 - half, start=True)

        copies(tile, block, half, start=False)
        for side in (keys, values):
            side.spread_scales(half)
        held = _held_slots(plan, bounds, table, tile, block)
        limits = bounds[2 * tile], bounds[2 * tile + 1]
        compute = functools.partial(_head, plan, block, half, held, limits)
        lax.fori_loop(
            0,
            top.shape[0],
            lambda head, _: compute(head, query, keys, values, position, (top, total, acc)),
            None,
        )
        done[0] = done[0] + 1

    lax.fori_loop(first, end, step, None)
    weight = jnp.where(total[...] > 0, total[...], 1)
    out[0] = acc[...] / weight[:, None]


def _begin(plan: Plan, positions, sinks, position, top, total, acc) -> None:
    """The state before a tile's first block."""
    of_row = lax.div(lax.broadcasted_iota(jnp.int32, position.shape, 0), plan.group)
    column = jnp.full(position.shape, -1, jnp.int32)

    def token(index, column):
        return jnp.where(of_row == index, positions[pl.program_id(0) * plan.tokens + index], column)

    position[...] = lax.fori_loop(0, plan.tokens, token, column)
    acc[...] = jnp.zeros(acc.shape, jnp.float32)
    if sinks is None:
        top[...] = jnp.full(top.shape, FLOOR, jnp.float32)
        total[...] = jnp.zeros(total.shape, jnp.float32)
    else:
        top[...] = sinks[...]
        total[...] = jnp.ones(total.shape, jnp.float32)


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
                values.buffer[half, place] = jnp.zeros(values.buffer.shape[2:], values.buffer.dtype)

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


def _head(
    plan: Plan, block, half, held, limits, head, query, keys: Side, values: Side, position, state
) -> None:
    """One KV head's part of one block: its scores, and its weights times values."""
    top, total, acc = state
    dtype = query.dtype
    scores = _scores(plan, half, head, query, keys)
    seen = []
    for fold in range(plan.keys.folds):
        slot = lax.broadcasted_iota(jnp.int32, scores[fold].shape, 1) * plan.keys.folds + fold
        seen.append(plan.options.in_sight(position[...], block * plan.slots + slot) & held)

    higher = top[head]
    for s, mine in zip(scores, seen, strict=True):
        higher = jnp.maximum(higher, jnp.where(mine, s, FLOOR).max(axis=1, keepdims=True))
    fade = jnp.exp(top[head] - higher)
    weights = [
        jnp.where(mine, jnp.exp(s - higher), 0.0).astype(dtype) for s, mine in zip(scores, seen, strict=True)
    ]
    top[head] = higher
    total[head] = total[head] * fade + sum(w.astype(jnp.float32).sum(axis=1, keepdims=True) for w in weights)
    weights = _refolded(plan, weights)
    used = block * plan.slots + plan.values.slots(plan.pages * plan.values.page_rows)
    used = (used >= limits[0]) & (used <= limits[1])
    acc[head] = acc[head] * fade
    for place, out in enumerate(_weighed(plan, half, head, weights, used, values)):
        acc[head, place] += out


def _scores(plan: Plan, half, head, query, keys: Side) -> list[jax.Array]:
    """For each fold the scores (queries, rows)."""
    layout, dtype = plan.keys, query.dtype
    stored, scales = keys.buffer[half, :, head], keys.scales_of(half, head)
    k = layout.decoded(stored, dtype) if scales is None else layout.scaled(stored, scales, dtype)
    queries = [query[0, head, place] for place in range(layout.places)]
    of_pages = None
    if scales is not None and layout.shifted:  # the same for each fold
        of_pages = _sum(
            _dot(layout.fold(q, 0).astype(jnp.float32), layout.shift_rows(scales, place), NT)
            for place, q in enumerate(queries)
        )
        of_pages = _dot(of_pages, _rows_of_pages(plan, layout), NN)
    scores = []
    for fold in range(layout.folds):
        mine = [layout.fold(q, fold) for q in queries]
        dots = _sum(_dot(q, rows, NT) for q, rows in zip(mine, k, strict=True))
        if keys.factors is not None:
            dots = dots * keys.of_slots(keys.factors, head, fold)
        if keys.shifts is not None:
            summed = _sum(q.astype(jnp.float32).sum(axis=1, keepdims=True) for q in mine)
            dots = dots + summed * keys.of_slots(keys.shifts, head, fold)
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


def _weighed(plan: Plan, half, head, weights, used, values: Side) -> list[jax.Array]:
    """For each place the sums (queries, lanes) of values times weights."""
    layout, dtype = plan.values, weights[0].dtype
    stored, scales = values.buffer[half, :, head], values.scales_of(half, head)
    v = layout.decoded(stored, jnp.float32) if scales is None else layout.scaled(stored, scales, jnp.float32)
    v = [jnp.where(used, rows, 0.0).astype(dtype) for rows in v]
    out = [jnp.zeros((plan.rows, layout.lanes), jnp.float32) for _ in v]
    for fold, w in enumerate(weights):
        wide = w.astype(jnp.float32)
        if values.factors is not None:
            w = (wide * values.of_slots(values.factors, head, fold)).astype(dtype)
        added = [_dot(w, rows, NN) for rows in v]
        if values.shifts is not None:
            shift = (wide * values.of_slots(values.shifts, head, fold)).sum(axis=1, keepdims=True)
            added = [part + shift for part in added]
        if scales is not None and layout.shifted:
            of_pages = _dot(wide, _rows_of_pages(plan, layout), NT)
            added = [
                part + _dot(of_pages, layout.shift_rows(scales, place), NN)
                for place, part in enumerate(added)
            ]
        out = [o + layout.fold(part, fold) for o, part in zip(out, added, strict=True)]
    return out


def _rows_of_pages(plan: Plan, layout: Pages) -> jax.Array:
    """(pages, rows): 1 where the row is the page's."""
    shape = plan.pages, plan.pages * layout.page_rows
    of_row = lax.div(lax.broadcasted_iota(jnp.int32, shape, 1), layout.page_rows)
    return (of_row == lax.broadcasted_iota(jnp.int32, shape, 0)).astype(jnp.float32)


def _sum(parts: Iterable[jax.Array]) -> jax.Array:
    return functools.reduce(jnp.add, parts)


def _dot(lhs: jax.Array, rhs: jax.Array, numbers: Any) -> jax.Array:
    precision = lax.Precision.HIGHEST if lhs.dtype == jnp.float32 else None
    return lax.dot_general(lhs, rhs, numbers, precision=precision, preferred_element_type=jnp.float32)
