"""The Pallas kernel that writes to pages on TPUs, in place.

Pages come to VMEM a few at a time, with the rows that go to them. Their codes are requantized where scales
have grown, the rows are put in, and each page is copied back once.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from qpaged._compat import kernel_output
from qpaged.arrays._packing import extract_codes, place_codes
from qpaged.arrays._protocol import ArrayFormat

Ref = Any  # Pallas exports no class for the references that a kernel gets


@dataclass(frozen=True)
class WriteCall:
    """The static description of one call.

    Attributes:
        quantizer: the pool's format.
        code_dtype: the dtype of codes, one an element.
        codes_per_byte: codes in a stored byte, or in one of the low plane.
        width: stored elements of a slot.
        pages_at_once: pages in VMEM, and rows of each that are copied at once.
    """

    quantizer: ArrayFormat
    code_dtype: Any
    codes_per_byte: int
    width: int
    pages_at_once: int


@dataclass(frozen=True)
class WriteRefs:
    """The references of one call: indices in SMEM, arrays in HBM, and their buffers in VMEM.

    Attributes:
        pages: [padded n] int32; -1 where there is no page.
        row_starts: [padded n + 1] int32; where the rows of each page begin.
        slots: [rows] int32; the slot of each row.
        num_written: [1] int32; how many pages are written to.
        rows: [padded rows, kv_heads, lanes].
        scales: old and new, [padded n, kv_heads, codes of a row of lanes]; none where codes stay.
        codes: [kv_heads, num_pages, page_rows, lanes], with a page's rows of lanes; the output, aliased to
            the pool.
        page_buffer: [pages_at_once, kv_heads, page_rows, lanes].
        row_buffer: [pages_at_once, pages_at_once, kv_heads, lanes]: so many rows of each page.
        scale_buffers: one for each of ``scales``, [pages_at_once, ...].
        semaphores: of the copies of pages, of rows and of scales. Copies of one kind share a semaphore, so
            all of them are waited for before any page is read.
    """

    pages: Ref
    row_starts: Ref
    slots: Ref
    num_written: Ref
    rows: Ref
    scales: Sequence[Ref]
    codes: Ref
    page_buffer: Ref
    row_buffer: Ref
    scale_buffers: Sequence[Ref]
    semaphores: Ref

    def copy_page_in(self, page_index: jax.Array, buffer_index: jax.Array) -> Any:
        source = self.codes.at[:, self.pages[page_index]]
        return pltpu.make_async_copy(source, self.page_buffer.at[buffer_index], self.semaphores.at[0])

    def copy_page_out(self, page_index: jax.Array, buffer_index: jax.Array) -> Any:
        target = self.codes.at[:, self.pages[page_index]]
        return pltpu.make_async_copy(self.page_buffer.at[buffer_index], target, self.semaphores.at[0])

    def copy_rows_in(self, first_row: jax.Array, buffer_index: jax.Array, count: int) -> Any:
        source = self.rows.at[pl.ds(first_row, count)]
        return pltpu.make_async_copy(source, self.row_buffer.at[buffer_index], self.semaphores.at[1])

    def copy_scales_in(self, first_page: jax.Array, count: int) -> list[Any]:
        copies = []
        for scales, buffer in zip(self.scales, self.scale_buffers, strict=True):
            source = scales.at[pl.ds(first_page, count)]
            copies.append(pltpu.make_async_copy(source, buffer, self.semaphores.at[2]))
        return copies


def write(
    call: WriteCall,
    pages: jax.Array,  # [padded n] int32
    row_starts: jax.Array,  # [padded n + 1] int32
    slots: jax.Array,  # [rows] int32
    num_written: jax.Array,  # [1] int32
    codes: jax.Array,  # [kv_heads, num_pages, page_rows, lanes]
    rows: jax.Array,  # [padded rows, kv_heads, lanes]
    scales: Sequence[jax.Array],  # old and new, [padded n, kv_heads, codes of a row of lanes], or none
) -> jax.Array:
    """Return ``codes`` with the rows of each page put in; the output aliases ``codes``."""
    at_once = call.pages_at_once
    heads, _, *page_shape = codes.shape
    buffers = [
        pltpu.VMEM((at_once, heads, *page_shape), codes.dtype),
        pltpu.VMEM((at_once, at_once, *rows.shape[1:]), rows.dtype),
        *(pltpu.VMEM((at_once, *part.shape[1:]), part.dtype) for part in scales),
    ]
    in_hbm = pl.BlockSpec(memory_space=pl.ANY)
    scalars = pages, row_starts, slots, num_written
    inputs = codes, rows, *scales
    return pl.pallas_call(
        functools.partial(_kernel, call, len(scales)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(1,),
            in_specs=[in_hbm] * len(inputs),
            out_specs=in_hbm,
            scratch_shapes=[*buffers, pltpu.SemaphoreType.DMA((3,))],
        ),
        # Inside shard_map the output varies over the mesh as these do.
        out_shape=kernel_output(codes.shape, codes.dtype, (inputs, pages, slots)),
        input_output_aliases={len(scalars): 0},  # of the codes
        name="write_pages",
    )(*scalars, *inputs)


def _kernel(
    call: WriteCall,
    num_scales: int,
    pages: Ref,
    row_starts: Ref,
    slots: Ref,
    num_written: Ref,
    _: Ref,  # the input that ``codes`` aliases
    rows: Ref,
    *rest: Ref,  # scales, codes, and the scratch memory
) -> None:
    """Write to all pages, a group at a time."""
    scales = rest[:num_scales]
    codes, page_buffer, row_buffer, *scale_buffers, semaphores = rest[num_scales:]
    refs = WriteRefs(
        pages=pages,
        row_starts=row_starts,
        slots=slots,
        num_written=num_written,
        rows=rows,
        scales=scales,
        codes=codes,
        page_buffer=page_buffer,
        row_buffer=row_buffer,
        scale_buffers=scale_buffers,
        semaphores=semaphores,
    )
    groups = lax.div(num_written[0] + call.pages_at_once - 1, call.pages_at_once)
    lax.fori_loop(0, groups, lambda group, _: _write_group(call, refs, group * call.pages_at_once), None)


def _write_group(call: WriteCall, refs: WriteRefs, first: jax.Array) -> None:
    """Write to the pages from ``first`` on: all copies in, one page after another, all copies out."""

    def start_copies(buffer_index: jax.Array) -> None:
        refs.copy_page_in(first + buffer_index, buffer_index).start()
        _copy_first_rows(call, refs, first, buffer_index).start()

    def wait_for_copies(buffer_index: jax.Array) -> None:
        refs.copy_page_in(first + buffer_index, buffer_index).wait()
        _copy_first_rows(call, refs, first, buffer_index).wait()

    def update(buffer_index: jax.Array) -> None:
        _update_page(call, refs, first + buffer_index, buffer_index)
        refs.copy_page_out(first + buffer_index, buffer_index).start()

    def wait_for_page(buffer_index: jax.Array) -> None:
        refs.copy_page_out(first + buffer_index, buffer_index).wait()

    scale_copies = refs.copy_scales_in(first, call.pages_at_once)
    for copy in scale_copies:
        copy.start()
    _for_each_page(call, refs, first, start_copies)
    for copy in scale_copies:
        copy.wait()
    _for_each_page(call, refs, first, wait_for_copies)
    _for_each_page(call, refs, first, update)
    _for_each_page(call, refs, first, wait_for_page)


def _copy_first_rows(call: WriteCall, refs: WriteRefs, first: jax.Array, buffer_index: jax.Array) -> Any:
    return refs.copy_rows_in(refs.row_starts[first + buffer_index], buffer_index, call.pages_at_once)


def _for_each_page(call: WriteCall, refs: WriteRefs, first: jax.Array, action: Any) -> None:
    """Call ``action`` with the buffer index of each page of a group that is there."""

    def one(buffer_index: jax.Array, _: None) -> None:
        @pl.when(refs.pages[first + buffer_index] >= 0)
        def run():
            action(buffer_index)

    lax.fori_loop(0, call.pages_at_once, one, None)


def _update_page(call: WriteCall, refs: WriteRefs, page_index: jax.Array, buffer_index: jax.Array) -> None:
    """Requantize the page in a buffer, and put its rows in."""
    stored = refs.page_buffer[buffer_index].astype(jnp.int32)  # [kv_heads, page_rows, lanes]
    if refs.scales:
        old, new = refs.scale_buffers
        stored = _requantize(call, stored, old[buffer_index], new[buffer_index])
    slot_of_lane = _slot_of_lane(stored.shape[1:], call.width)
    start, end = refs.row_starts[page_index], refs.row_starts[page_index + 1]

    def put_row(row: jax.Array, stored: jax.Array) -> jax.Array:
        # The first rows were copied with the page, and so many more come when these are used up.
        row_in_buffer = lax.rem(row - start, call.pages_at_once)

        @pl.when((row_in_buffer == 0) & (row > start))
        def fetch_more_rows():
            copy = refs.copy_rows_in(row, buffer_index, call.pages_at_once)
            copy.start()
            copy.wait()

        new = refs.row_buffer[buffer_index, row_in_buffer].astype(jnp.int32)  # [kv_heads, lanes]
        return jnp.where(slot_of_lane[None] == refs.slots[row], new[:, None], stored)

    stored = lax.fori_loop(start, end, put_row, stored)
    refs.page_buffer[buffer_index] = stored.astype(refs.page_buffer.dtype)


def _slot_of_lane(shape: tuple[int, ...], width: int) -> jax.Array:
    """Return the slot of each element of a page (page_rows, lanes), of which ``width`` are one slot's."""
    slots_per_row = shape[1] // width
    lane = lax.broadcasted_iota(jnp.int32, shape, 1)
    return lax.broadcasted_iota(jnp.int32, shape, 0) * slots_per_row + lax.div(lane, width)


def _requantize(
    call: WriteCall,
    stored: jax.Array,  # [kv_heads, page_rows, lanes] int32
    old: jax.Array,  # [kv_heads, codes of a row of lanes]
    new: jax.Array,
) -> jax.Array:
    """Return stored bytes whose codes were under ``old`` scales, with codes under ``new`` ones."""
    growth = call.quantizer.growth
    assert growth is not None  # the kernel takes scales only where they grow
    bits, slots = call.quantizer.bits, stored.shape[-1] // call.width
    codes_at_index = old.shape[-1] // call.codes_per_byte
    requantized = jnp.zeros(stored.shape, jnp.int32)
    for byte_index in range(call.codes_per_byte):
        of_index = slice(byte_index * codes_at_index, (byte_index + 1) * codes_at_index)
        before, after = old[:, None, of_index], new[:, None, of_index]
        codes = extract_codes(stored, bits, byte_index, call.code_dtype, slots=slots)
        grown = growth.requantize(codes, before, after)
        # A block that holds nothing but zeros has scale 0: its codes, which may be stale, are left.
        grown = jnp.where((before != 0) & (before != after), grown, codes).astype(jnp.int32)
        requantized |= place_codes(grown, bits, byte_index, slots)
    return requantized
