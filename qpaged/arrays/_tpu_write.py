"""Writes to pages on TPUs: what the kernel takes, and how its operands are laid out.

XLA would copy the pool to grow codes, or to write slots that share a row of lanes. The kernel of
:mod:`qpaged.arrays._tpu_write_kernel` brings a few pages at a time to fast memory, with the rows that go to
them; each page is copied in once and out once.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from qpaged._compat import has_pallas_tpu
from qpaged.arrays._elementwise import not_elementwise
from qpaged.arrays._lane_rows import LANES, from_lane_rows, slot_shape
from qpaged.arrays._quantized import QuantizedArray
from qpaged.arrays._tpu_scales import ScaleOrder

PAGES_AT_ONCE = 8  # pages in VMEM; also the rows of each that are copied at a time
LARGEST_PAGE = 2**19  # bytes of one page, all heads: eight of them must fit VMEM
MOST_ROWS = 2**16  # slots, pages and row starts, int32 and as many each, must fit SMEM, which has 1 MB


class ScalesOfPages(NamedTuple):
    """Stored scales of n pages, (n, kv_heads, 1, channels or 1).

    Attributes:
        old: those that the codes of the pages are under, 0 where nothing was written to a page.
        new: those that the codes are requantized to.
    """

    old: jax.Array
    new: jax.Array


def takes(array: QuantizedArray, axes: tuple[int, ...], num_rows: int) -> bool:
    """Return True if the kernel can write so many rows at (page, slot) of the array."""
    if array.ndim != 4 or axes != (1, 2) or not has_pallas_tpu():
        return False
    if array.channel_axis != -1 or num_rows > MOST_ROWS:
        return False
    heads, _, page_size, width = slot_shape(array.stored.shape, array.slots_per_row)
    fills_lanes = width % LANES == 0 or LANES % width == 0 or array.slots_per_row > 1
    if not fills_lanes or page_size % 16:
        return False
    return heads * page_size * width * array.stored.dtype.itemsize <= LARGEST_PAGE


def grows(array: QuantizedArray) -> bool:
    """Return True if the kernel requantizes codes, in a pool that it takes, as their scales grow."""
    quantizer = array.quantizer
    if array.scales is None or array.global_scale is not None or quantizer.growth is None:
        return False
    has_page_scales = array.scales.shape[2] == 1
    if not has_page_scales or not quantizer.elementwise:
        return False
    scale_dtype = array.scales.dtype
    dtypes = quantizer.code_dtype(array.dtype), scale_dtype, scale_dtype
    return not_elementwise(quantizer.growth.requantize, *dtypes) is None


def write(
    array: QuantizedArray,
    pages: jax.Array,  # [n] int32
    page_of_row: jax.Array,  # [rows] int32
    slots: jax.Array,  # [rows] int32
    rows: jax.Array,  # [rows, kv_heads, width], codes as they are stored
    scales: ScalesOfPages | None = None,
) -> jax.Array:
    """Return the codes of a pool with ``rows`` put in, after the codes of their pages were requantized.

    Args:
        array: the pool.
        pages: distinct pages in range, ascending, and then entries past the end.
        page_of_row: for each row, the index of its page in ``pages``.
        slots: the slot that each row goes to; out of range is dropped.
        rows: where several go to one slot, the last counts.
        scales: old and new scales of ``pages``; None leaves the codes as they are.
    """
    from qpaged.arrays import _tpu_write_kernel  # imports Pallas, which takes a second

    heads, num_pages, page_size, width = slot_shape(array.stored.shape, array.slots_per_row)
    lanes = math.lcm(width, LANES)
    codes = array.stored.reshape(heads, num_pages, page_size * width // lanes, lanes)

    inside = (pages >= 0) & (pages < num_pages)
    order = jnp.argsort(page_of_row, stable=True)  # of rows to one slot the last stays last
    page_numbers = jnp.arange(len(pages) + 1, dtype=jnp.int32)
    row_starts = jnp.searchsorted(page_of_row[order], page_numbers, method="compare_all").astype(jnp.int32)
    padding = -len(pages) % PAGES_AT_ONCE
    lane_scales = []
    if scales is not None:
        for part in scales:
            lane_scales.append(_scales_of_lanes(part, array, lanes // width, padding))
    rows = jnp.tile(rows[order], lanes // width)  # into the lanes of every slot of a row
    rows = jnp.pad(rows, ((0, PAGES_AT_ONCE), (0, 0), (0, 0)))  # copies may run past the last row
    pages = jnp.pad(jnp.where(inside, pages, -1), (0, padding), constant_values=-1)
    row_starts = jnp.pad(row_starts, (0, padding), mode="edge")

    call = _tpu_write_kernel.WriteCall(
        quantizer=array.quantizer,
        code_dtype=array.quantizer.code_dtype(array.dtype),
        codes_per_byte=array.codes_per_byte,
        width=width,
        pages_at_once=PAGES_AT_ONCE,
    )
    num_inside = inside.sum(dtype=jnp.int32)[None]
    out = _tpu_write_kernel.write(call, pages, row_starts, slots[order], num_inside, codes, rows, lane_scales)
    return out.reshape(heads, num_pages, page_size, width)


def _scales_of_lanes(
    scales: jax.Array,  # [n, kv_heads, 1, channels or 1]
    array: QuantizedArray,
    slots: int,
    padding: int,
) -> jax.Array:
    """Return stored scales as (n + padding, kv_heads, slots * channels), for rows of so many slots.

    The codes of byte index i come i-th; of those, code c of each slot has the scale of channel
    c * codes_per_byte + i.
    """
    n, heads = scales.shape[:2]
    channels, codes_per_byte = array.shape[-1], array.codes_per_byte
    of_channels = jnp.broadcast_to(scales, (n, heads, 1, channels))
    of_bytes = of_channels.reshape(n, heads, channels // codes_per_byte, codes_per_byte).swapaxes(-1, -2)
    of_lanes = jnp.tile(of_bytes, slots).reshape(n, heads, slots * channels)
    return jnp.pad(of_lanes, ((0, padding), (0, 0), (0, 0)))


def gather_pages(part: jax.Array, pages: jax.Array) -> jax.Array:
    """Return the pages (n, kv_heads, ...) of a pool's part at ``pages`` (n,); zeros where out of range."""
    flat, index = _pages_of_each_head(part, pages)
    return flat.at[index].get(mode="fill", fill_value=0)


def gather_page_windows(array: QuantizedArray, pages: jax.Array) -> jax.Array:
    """Return the codes (n, kv_heads, 1, page_size, width) of ``pages`` (n,)."""
    rows = gather_pages(array.stored, pages)
    return jnp.expand_dims(from_lane_rows(rows, array.slots_per_row), 2)  # a window is one page long


def scatter_pages(part: jax.Array, pages: jax.Array, new: jax.Array) -> jax.Array:
    """Return ``part`` with ``new`` (n, kv_heads, ...) put at ``pages`` (n,); out of range is dropped."""
    flat, index = _pages_of_each_head(part, pages)
    return flat.at[index].set(new, mode="drop").reshape(part.shape)


def _pages_of_each_head(part: jax.Array, pages: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return a pool's part as (kv_heads * pages, ...), and the indices (n, kv_heads) of pages in it.

    XLA gathers slices of one head in place; for slices of all heads it would bring the whole pool into
    another layout.
    """
    heads, num_pages = part.shape[:2]
    head_start = jnp.arange(heads, dtype=jnp.int32) * num_pages
    inside = (pages >= 0) & (pages < num_pages)
    index = jnp.where(inside[:, None], head_start + pages[:, None], heads * num_pages)
    return part.reshape(heads * num_pages, *part.shape[2:]), index


def gather_scales(scales: jax.Array, pages: jax.Array) -> jax.Array:
    """Return the scales (n, kv_heads, slots, groups) of ``pages`` (n,); any where out of range."""
    if scales.shape[2] == 1:
        return gather_pages(scales, pages)
    order = ScaleOrder.of(scales)
    return order.flatten(scales).at[_scales_of_pages(order, pages)].get(mode="clip")


def scatter_scales(scales: jax.Array, pages: jax.Array, new: jax.Array) -> jax.Array:
    """Return scales with ``new`` ones (n, kv_heads, slots, groups) at ``pages``; out of range is dropped."""
    if scales.shape[2] == 1:
        return scatter_pages(scales, pages, new)
    order = ScaleOrder.of(scales)
    index = _scales_of_pages(order, pages)
    return order.unflatten(order.flatten(scales).at[index].set(new, mode="drop"))


def _scales_of_pages(order: ScaleOrder, pages: jax.Array) -> jax.Array:
    """Return flat indices (n, kv_heads, slots, groups) of the scales of pages; past the end out of range."""
    head = jnp.arange(order.heads, dtype=jnp.int32)[:, None, None]
    slot = jnp.arange(order.slots, dtype=jnp.int32)[:, None]
    group = jnp.arange(order.groups, dtype=jnp.int32)
    page = pages[:, None, None, None]
    inside = (page >= 0) & (page < order.pages)
    size = order.heads * order.pages * order.slots * order.groups
    return jnp.where(inside, order.flat_index(head, page, slot, group), size)


def scatter_slot_scales(
    scales: jax.Array,  # [kv_heads, pages, slots, groups]
    page_and_slot: jax.Array,  # [n, 2]
    new: jax.Array,  # [n, kv_heads, groups]
) -> jax.Array:
    """Return the scales of slots with ``new`` ones put at (page, slot); out of range is dropped."""
    heads, num_pages, slots, groups = scales.shape
    order = ScaleOrder.of(scales)
    by_column = page_and_slot.T
    page, slot = by_column[0][:, None, None], by_column[1][:, None, None]
    head = jnp.arange(heads, dtype=jnp.int32)[:, None]
    group = jnp.arange(groups, dtype=jnp.int32)
    inside = (page >= 0) & (page < num_pages) & (slot >= 0) & (slot < slots)
    index = jnp.where(inside, order.flat_index(head, page, slot, group), scales.size)
    return order.unflatten(order.flatten(scales).at[index].set(new, mode="drop"))
