"""The Pallas kernel that writes to pages on TPUs: it grows their codes and puts new ones in, in place.

XLA would copy the pool to do so. Pages come to fast memory a few at a time, with the rows that go to them;
each is copied in once and out once.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from qpaged._compat import shaped_as, version_tuple
from qpaged.arrays._packing import BYTE
from qpaged.arrays._tiles import refused

LANES = 128
AT_ONCE = 8  # pages in fast memory, and rows of each that come along
LARGEST_PAGE = 2**19  # elements of all heads
OLDEST_JAX = (0, 10)


def takes(array: Any, axes: tuple[int, ...]) -> bool:
    """Whether the kernel writes rows to (page, slot) of a pool: it must be what grows its scales."""
    if array.ndim != 4 or axes != (1, 2) or version_tuple(jax.__version__) < OLDEST_JAX:
        return False
    heads, _, page_size, width = array.codes.shape
    shared = array.scales is not None and array.outer is None and array.scales.shape[2] < page_size
    whole = (width % LANES == 0 or LANES % width == 0) and page_size % 16 == 0
    if not (shared and whole and heads * page_size * width <= LARGEST_PAGE):
        return False
    quantizer = array.quantizer
    dtypes = quantizer.code_dtype(array.dtype), array.scales.dtype, array.scales.dtype
    return quantizer.tiled and refused(quantizer.grow, *dtypes) is None


def write(array: Any, pages, of_row, slot, old, new, rows) -> jax.Array:
    """The codes of a pool with ``rows`` put in, and what was there brought under the ``new`` scales.

    Args:
        array: the pool.
        pages: (n,) int32; distinct pages, ascending, out of range where there are no more.
        of_row: (rows,) int32; which of these each row goes to.
        slot: (rows,) int32.
        old, new: (n, kv_heads, 1, channels or 1); stored scales; 0 where nothing was written to a page.
        rows: (rows, kv_heads, width); codes as they are stored.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    heads, count, page_size, width = array.codes.shape
    lanes, several = max(LANES, width), array.packing
    codes = array.codes.reshape(heads, count, page_size * width // lanes, lanes)
    inside = (pages >= 0) & (pages < count)
    order = jnp.argsort(of_row)  # stable: of rows to one slot the last stays
    places = jnp.arange(len(pages) + 1, dtype=jnp.int32)
    starts = jnp.searchsorted(of_row[order], places, method="compare_all").astype(jnp.int32)
    missing = -len(pages) % AT_ONCE
    scales = [_of_lanes(part, several, width, lanes, missing) for part in (old, new)]
    rows = jnp.pad(jnp.tile(rows[order], lanes // width), ((0, AT_ONCE), (0, 0), (0, 0)))
    pages = jnp.pad(jnp.where(inside, pages, -1), (0, missing), constant_values=-1)
    starts = jnp.pad(starts, (0, missing), mode="edge")
    kernel = functools.partial(
        _kernel, array.quantizer, array.quantizer.code_dtype(array.dtype), several, width
    )
    buffers = [(codes, (heads, *codes.shape[2:])), (rows, (AT_ONCE, *rows.shape[1:]))]
    out = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(1,),
            in_specs=[pl.BlockSpec(memory_space=pl.ANY)] * 4,
            out_specs=pl.BlockSpec(memory_space=pl.ANY),
            scratch_shapes=[
                *(pltpu.VMEM((AT_ONCE, *shape), part.dtype) for part, shape in buffers),
                *(pltpu.VMEM((AT_ONCE, *part.shape[1:]), part.dtype) for part in scales),
                pltpu.SemaphoreType.DMA((3,)),
            ],
        ),
        out_shape=shaped_as(codes.shape, codes.dtype, (codes, rows, scales, pages, slot)),
        input_output_aliases={4: 0},
        name="write_pages",
    )(pages, starts, slot[order], inside.sum(dtype=jnp.int32)[None], codes, rows, *scales)
    return out.reshape(array.codes.shape)


def take(part: jax.Array, pages: jax.Array) -> jax.Array:
    """(n, kv_heads, ...) of ``pages`` (n,); zeros where out of range."""
    flat, at = _each_head(part, pages)
    return flat.at[at].get(mode="fill", fill_value=0)


def put(part: jax.Array, pages: jax.Array, new: jax.Array) -> jax.Array:
    """``part`` with ``new`` (n, kv_heads, ...) put at ``pages`` (n,); out of range is dropped."""
    flat, at = _each_head(part, pages)
    return flat.at[at].set(new, mode="drop").reshape(part.shape)


def puts_slots(array: Any, axes: tuple[int, ...]) -> bool:
    """Whether rows written to (page, slot) of a pool have scales of their own, for :func:`put_slots`."""
    modern = version_tuple(jax.__version__) >= OLDEST_JAX
    return modern and array.ndim == 4 and axes == (1, 2) and array.scales.shape[2] == array.shape[2] > 1


def put_slots(scales: jax.Array, places: jax.Array, new: jax.Array) -> jax.Array:
    """The scales of slots with ``new`` (n, kv_heads, groups) put at ``places`` (n, 2), (page, slot).

    One by one, in the order in which TPUs keep them, pages last: for anything longer XLA would bring the
    whole pool's into another. Out of range is dropped.
    """
    heads, count, slots, groups = scales.shape
    flat = scales.transpose(0, 2, 3, 1).reshape(-1)
    page, slot = (place[:, None, None] for place in places.T)
    head, group = jnp.arange(heads, dtype=jnp.int32)[:, None], jnp.arange(groups, dtype=jnp.int32)
    inside = (page >= 0) & (page < count) & (slot >= 0) & (slot < slots)
    at = jnp.where(inside, ((head * slots + slot) * groups + group) * count + page, flat.size)
    flat = flat.at[at].set(new, mode="drop")
    return flat.reshape(heads, slots, groups, count).transpose(0, 3, 1, 2)


def _each_head(part: jax.Array, pages: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A pool's part as (kv_heads · pages, ...), and where each head's pages (n, kv_heads) are in it.

    XLA finds slices of one head where they lie; for those of all heads it would bring the whole pool into
    another layout.
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


def _kernel(
    quantizer, code_dtype, several, width, pages, starts, slots, count, _, rows, old, new, codes, *scratch
):
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    page_buffer, row_buffer, old_buffer, new_buffer, semaphore = scratch
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
            for part, buffer in ((old, old_buffer), (new, new_buffer))
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
            stored = _grown(quantizer, code_dtype, several, stored, old_buffer[place], new_buffer[place])
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
