"""The copies of pages and scales to shared memory, in the kernel of the ``gpu`` backend.

A tile's pages and the scales of its slots are copied to one of several stages, while the kernel computes with
another. Scales of pages are few, and go to registers instead.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from qpaged.attention._gpu import KV_TILE
from qpaged.attention._gpu_refs import GPUCall, KVRefs, Refs


class TilePages(NamedTuple):
    """The pages of a tile.

    Attributes:
        pages: the entry of the page table behind each copy of the tile, which may be no page.
        k_scales: the stored scale of each page of keys; empty unless a page has one scale.
        v_scales: the stored scale of each page of values, likewise.
    """

    pages: tuple[jax.Array, ...]
    k_scales: tuple[jax.Array, ...]
    v_scales: tuple[jax.Array, ...]


def load_tile_pages(refs: Refs, kv_tile: jax.Array) -> TilePages:
    """Return the pages of a tile and their scales; those of the split's last tile if the tile is past it."""
    pages = _load_pages(refs, jnp.maximum(jnp.minimum(kv_tile, refs.end - 1), 0))
    k_scales = _load_page_scales(refs, refs.keys, pages)
    return TilePages(pages, k_scales, _load_page_scales(refs, refs.values, pages))


def _load_pages(refs: Refs, kv_tile: jax.Array) -> tuple[jax.Array, ...]:
    """Return the entry of the page table behind each copy of a tile."""
    call = refs.call
    pages = []
    for copy_index in range(call.copies_per_tile):
        slot = kv_tile * KV_TILE + copy_index * call.copy_slots
        logical_page = lax.div(slot, jnp.int32(call.keys.page_size))
        pages.append(refs.table[refs.sequence * call.table_pages + logical_page])
    return tuple(pages)


def _load_page_scales(refs: Refs, kv: KVRefs, pages: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """Return the stored scale of each page; nothing unless a page has one scale."""
    if not kv.has_page_scales:
        return ()
    scales = []
    for page in pages:
        scale = kv.pool.scales[refs.head, _page_or_zero(refs.call, page)]
        if jnp.issubdtype(scale.dtype, jnp.integer):
            scale = scale.astype(jnp.int32)  # the kernel calculates with integers of 32 bits only
        scales.append(scale)
    return tuple(scales)


def start_copies(refs: Refs, kv_tile: jax.Array, stage: jax.Array) -> None:
    """Start the copies of a tile to a stage, if the tile is one of this split."""

    @pl.when(kv_tile < refs.end)
    def start_tile() -> None:
        pages = _load_pages(refs, kv_tile)

        # One warp starts all copies, so that the other three need not wait for each.
        @plgpu.warp_map
        def start_in_warp(warp: jax.Array) -> None:
            @pl.when(warp == 0)
            def start() -> None:
                for copy_index, page in enumerate(pages):
                    _start_copy(refs, kv_tile, stage, copy_index, page)


def _start_copy(refs: Refs, kv_tile: jax.Array, stage: jax.Array, copy_index: int, page: jax.Array) -> None:
    """Start one copy of keys and of values, and of scales if every slot has one."""
    call = refs.call
    page = _page_or_zero(call, page)
    slot_in_page = lax.rem(kv_tile * KV_TILE + copy_index * call.copy_slots, call.keys.page_size)
    source = pl.ds(slot_in_page, call.copy_slots)
    target = pl.ds(copy_index * call.copy_slots, call.copy_slots)
    copied = refs.scratch.tile_copied.at[stage]
    for kv in (refs.keys, refs.values):
        slots = kv.pool.pages.at[refs.head, page, source]
        if kv.stages.high_plane is not None:
            high = slots.at[:, pl.ds(kv.layout.slot_width, kv.layout.run_width)]
            slots = slots.at[:, pl.ds(0, kv.layout.slot_width)]
            plgpu.copy_gmem_to_smem(high, kv.stages.high_plane.at[stage, target], copied)
        plgpu.copy_gmem_to_smem(slots, kv.stages.pages.at[stage, target], copied)
        if kv.stages.scales is not None:
            plgpu.copy_gmem_to_smem(
                kv.pool.scales.at[refs.head, page, source], kv.stages.scales.at[stage, target], copied
            )


def is_page(call: GPUCall, page: jax.Array) -> jax.Array:
    """Return True if an entry of the page table is a page."""
    return (page >= 0) & (page < call.options.num_pages)


def _page_or_zero(call: GPUCall, page: jax.Array) -> jax.Array:
    """Return a page that can be read: page 0, which is masked, for an entry that is no page."""
    return jnp.where(is_page(call, page), page, 0)
