"""The Pallas kernel that writes to pages on TPUs: it grows their codes and puts new ones in, in place.

XLA would copy the pool to grow codes, or to write slots that share a row of lanes. Pages come to fast memory
a few at a time, with the rows that go to them; each is copied in once and out once.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from qpaged._compat import shaped_as, version_tuple
from qpaged.arrays._folds import LANES
from qpaged.arrays._packing import BYTE
from qpaged.arrays._tiles import refused
from qpaged.arrays._tpu_scales import Order

AT_ONCE = 8  # pages in fast memory, and rows of each that come along
LARGEST_PAGE = 2**19  # bytes of all heads
MOST_ROWS = 2**16  # whose places scalar memory holds
OLDEST_JAX = (0, 10)


def takes(array: Any, axes: tuple[int, ...], rows: int) -> bool:
    """Whether the kernel writes so many rows to (page, slot) of a pool."""
    if array.ndim != 4 or axes != (1, 2) or version_tuple(jax.__version__) < OLDEST_JAX:
        return False
    heads, _, page_size, channels = array.shape
    width = channels // array.packing
    whole = (width % LANES == 0 or LANES % width == 0) and page_size % 16 == 0
    if not whole or array.channel_axis != -1 or rows > MOST_ROWS:
        return False
    return heads * page_size * width * array.folded.dtype.itemsize <= LARGEST_PAGE


def grows(array: Any) -> bool:
    """Whether the kernel brings the codes of a pool that it takes under new scales of their pages."""
    quantizer = array.quantizer
    if array.scales is None or array.outer is not None or array.scales.shape[2] > 1:
        return False
    dtypes = quantizer.code_dtype(array.dtype), array.scales.dtype, array.scales.dtype
    return quantizer.tiled and refused(quantizer.grow, *dtypes) is None


def write(array: Any, pages, of_row, slot, rows, scales=None) -> jax.Array:
    """The codes of a pool with ``rows`` put in.

    Args:
        array: the pool.
        pages: (n,) int32; distinct pages, ascending, out of range where there are no more.
        of_row: (rows,) int32; which of these each row goes to.
        slot: (rows,) int32; out of range is dropped.
        rows: (rows, kv_heads, width); codes as they are stored.
        scales: two of (n, kv_heads, 1, channels or 1): those that the codes of the pages are under, 0 where
            nothing was written to a page, and those that they are brought under; None leaves them.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    heads, count, page_size, channels = array.shape
    several = array.packing
    width = channels // several
    lanes = max(LANES, width)
    codes = array.folded.reshape(heads, count, page_size * width // lanes, lanes)
    inside = (pages >= 0) & (pages < count)
    order = jnp.argsort(of_row)  # stable: of rows to one slot the last stays
    places = jnp.arange(len(pages) + 1, dtype=jnp.int32)
    starts = jnp.searchsorted(of_row[order], places, method="compare_all").astype(jnp.int32)
    missing = -len(pages) % AT_ONCE
    parts = [_of_lanes(part, several, width, lanes, missing) for part in scales or ()]
    rows = jnp.pad(jnp.tile(rows[order], lanes // width), ((0, AT_ONCE), (0, 0), (0, 0)))
    pages = jnp.pad(jnp.where(inside, pages, -1), (0, missing), constant_values=-1)
    starts = jnp.pad(starts, (0, missing), mode="edge")
    grown = functools.partial(_grown, array.quantizer, array.quantizer.code_dtype(array.dtype), several)
    buffers = [
        (codes, (heads, *codes.shape[2:])),
        (rows, (AT_ONCE, *rows.shape[1:])),
        *((part, part.shape[1:]) for part in parts),
    ]
    out = pl.pallas_call(
        functools.partial(_kernel, grown, width, len(parts)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(1,),
            in_specs=[pl.BlockSpec(memory_space=pl.ANY)] * len(buffers),
            out_specs=pl.BlockSpec(memory_space=pl.ANY),
            scratch_shapes=[
                *(pltpu.VMEM((AT_ONCE, *shape), part.dtype) for part, shape in buffers),
                pltpu.SemaphoreType.DMA((3,)),
            ],
        ),
        out_shape=shaped_as(codes.shape, codes.dtype, (codes, rows, parts, pages, slot)),
        input_output_aliases={4: 0},
        name="write_pages",
    )(pages, starts, slot[order], inside.sum(dtype=jnp.int32)[None], codes, rows, *parts)
    return out.reshape(heads, count, page_size, width)


def take(part: jax.Array, pages: jax.Array) -> jax.Array:
    """(n, kv_heads, ...) of ``pages`` (n,); zeros where out of range."""
    flat, at = _each_head(part, pages)
    return flat.at[at].get(mode="fill", fill_value=0)


def put(part: jax.Array, pages: jax.Array, new: jax.Array) -> jax.Array:
    """``part`` with ``new`` (n, kv_heads, ...) put at ``pages`` (n,); out of range is dropped."""
    flat, at = _each_head(part, pages)
    return flat.at[at].set(new, mode="drop").reshape(part.shape)


def put_slots(scales: jax.Array, places: jax.Array, new: jax.Array) -> jax.Array:
    """The scales of slots with ``new`` (n, kv_heads, groups) put at ``places`` (n, 2), (page, slot); out of
    range is dropped."""
    heads, count, slots, groups = scales.shape
    order = Order.of(scales)
    page, slot = (place[:, None, None] for place in places.T)
    head, group = jnp.arange(heads, dtype=jnp.int32)[:, None], jnp.arange(groups, dtype=jnp.int32)
    inside = (page >= 0) & (page < count) & (slot >= 0) & (slot < slots)
    at = jnp.where(inside, order.at(head, page, slot, group), scales.size)
    return order.back(order.flat(scales).at[at].set(new, mode="drop"))


def _each_head(part: jax.Array, pages: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A pool's part as (kv_heads · pages, ...), and where each head's pages (n, kv_heads) are in it.

    XLA finds slices of one head where they lie; for those of all heads it would bring the whole pool into
    another layout. So does :func:`put`.
    """
    heads, count = part.shape[:2]
    head = jnp.arange(heads, dtype=jnp.int32) * count
    inside = (pages >= 0) & (pages < count)
    at = jnp.where(inside[:, None], head + pages[:, None], heads * count)
    return part.reshape(heads * count, *part.shape[2:]), at


def _of_lanes(scales: jax.Array, several: int, width: int, lanes: int, missing: int) -> jax.Array:
    """Stored scales (n, kv_heads, 1, channels or 1) as (n, kv_heads, several · lanes), place by place."""
    n, heads = scales.shape[:2]
    wide = jnp.broadcast_to(scales, (n, heads, 1, width * several)).reshape(n, heads, width, several)
    spread = jnp.tile(wide.swapaxes(-1, -2), lanes // width).reshape(n, heads, several * lanes)
    return jnp.pad(spread, ((0, missing), (0, 0), (0, 0)))


def _kernel(grown, width, scaled, pages, starts, slots, count, _, rows, *others):
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    scales, (codes, page_buffer, row_buffer, *scratch) = others[:scaled], others[scaled:]
    *scale_buffers, semaphore = scratch
    copy = pltpu.make_async_copy

    def reads(first, place):
        page, start = pages[first + place], starts[first + place]
        yield copy(codes.at[:, page], page_buffer.at[place], semaphore.at[0])
        yield copy(rows.at[pl.ds(start, AT_ONCE)], row_buffer.at[place], semaphore.at[1])

    def written(first, place):
        return copy(page_buffer.at[place], codes.at[:, pages[first + place]], semaphore.at[0])

    def for_pages(first, act):
        def one(place, _):
            @pl.when(pages[first + place] >= 0)
            def there():
                act(place)

        lax.fori_loop(0, AT_ONCE, one, None)

    def group(index, _):
        first = index * AT_ONCE
        of_scales = [
            copy(part.at[pl.ds(first, AT_ONCE)], buffer, semaphore.at[2])
            for part, buffer in zip(scales, scale_buffers, strict=True)
        ]
        for part in of_scales:
            part.start()

        def start(place):
            for part in reads(first, place):
                part.start()

        def wait(place):
            for part in reads(first, place):
                part.wait()

        for_pages(first, start)
        for part in of_scales:
            part.wait()
        for_pages(first, wait)

        def update(place):
            stored = page_buffer[place].astype(jnp.int32)
            if scaled:
                stored = grown(stored, *(buffer[place] for buffer in scale_buffers))
            shape = stored.shape[1:]
            folds = shape[1] // width
            lane = lax.broadcasted_iota(jnp.int32, shape, 1)
            slot = lax.broadcasted_iota(jnp.int32, shape, 0) * folds + lax.div(lane, width)
            start, end = starts[first + place], starts[first + place + 1]

            def put(row, stored):
                at = lax.rem(row - start, AT_ONCE)

                @pl.when((at == 0) & (row > start))
                def more():
                    fetch = copy(rows.at[pl.ds(row, AT_ONCE)], row_buffer.at[place], semaphore.at[1])
                    fetch.start()
                    fetch.wait()

                mine = row_buffer[place, at].astype(jnp.int32)
                return jnp.where(slot[None] == slots[row], mine[:, None], stored)

            stored = lax.fori_loop(start, end, put, stored)
            page_buffer[place] = stored.astype(page_buffer.dtype)
            written(first, place).start()

        for_pages(first, update)
        for_pages(first, lambda place: written(first, place).wait())

    lax.fori_loop(0, lax.div(count[0] + AT_ONCE - 1, AT_ONCE), group, None)


def _grown(quantizer, code_dtype, several, stored, old, new) -> jax.Array:
    """Stored bytes (kv_heads, rows, lanes), int32, whose codes were under ``old`` scales, under ``new``."""
    lanes, bits = stored.shape[-1], BYTE // several
    made = jnp.zeros(stored.shape, jnp.int32)
    for place in range(several):
        of_place = slice(place * lanes, (place + 1) * lanes)
        before, after = (part[:, None, of_place] for part in (old, new))
        codes = _taken(stored, bits, place, code_dtype)
        grown = quantizer.grow(codes, before, after)
        grown = jnp.where((before != 0) & (before != after), grown, codes).astype(jnp.int32)
        made |= lax.shift_left(grown & ((1 << bits) - 1), bits * place)
    return made


def _taken(stored, bits, place, code_dtype):
    signed = jnp.issubdtype(code_dtype, jnp.signedinteger)
    down = lax.shift_right_arithmetic if signed else lax.shift_right_logical
    high = lax.shift_left(stored, 32 - bits * (place + 1))
    return down(high, 32 - bits).astype(code_dtype)
