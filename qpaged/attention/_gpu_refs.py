"""What the kernel of the ``gpu`` backend works on: the static call, and references to either memory."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike

from qpaged.attention._gpu import KV_TILE
from qpaged.attention._layout import Layout
from qpaged.attention._options import Options

STAGES_BYTES = 3 * 2**14  # of all stages, if that holds two: three programs then share a multiprocessor
SWIZZLE_BYTES = 128  # of a row of shared memory, at most
SWIZZLE_ROWS = 8

Ref = Any  # an array in some memory; the type that JAX gives it does not say that it can be indexed
Spec = Any  # a memory space with a shape and a dtype, which becomes a Ref in the kernel


@dataclass(frozen=True)
class GPUCall:
    """The static description of one call.

    Attributes:
        keys: how the pages of keys lie.
        values: how the pages of values lie.
        options: the options of the attention.
        num_q_tiles: query tiles.
        q_rows: query rows of a KV head in a query tile, a multiple of 8.
        splits: splits of a sequence, each a program of its own.
        table_pages: entries of a row of the page table, whole tiles of them.
        tiles_per_run: query tiles that read one row of the page table, one after another.
    """

    keys: Layout
    values: Layout
    options: Options
    num_q_tiles: int
    q_rows: int
    splits: int
    table_pages: int
    tiles_per_run: int

    @property
    def stages(self) -> int:
        """Tiles that are copied ahead, the one that is computed with included."""
        tile_bytes = KV_TILE * (self.keys.slot_bytes + self.values.slot_bytes)
        return max(2, min(6, STAGES_BYTES // tile_bytes))

    @property
    def copy_slots(self) -> int:
        """Slots that one copy brings: a page, or a tile's part of one."""
        return min(self.keys.page_size, KV_TILE)

    @property
    def copies_per_tile(self) -> int:
        """Copies that bring a tile of keys, or of values."""
        return KV_TILE // self.copy_slots


class GMEMPool(NamedTuple):
    """Keys or values in the GPU's memory.

    Attributes:
        pages: [kv_heads, num_pages, page_size, stored elements of a slot], codes or floats.
        scales: as they are stored, [kv_heads, num_pages] or [kv_heads, num_pages, page_size]; None if there
            are none.
    """

    pages: Ref
    scales: Ref


class Stages(NamedTuple):
    """Keys or values in shared memory, as they are stored.

    Attributes:
        pages: [stages, KV_TILE, slot_width].
        high_plane: [stages, KV_TILE, run_width]; None unless codes are in two planes.
        scales: [stages, KV_TILE]; None unless every slot has a scale.
    """

    pages: Ref
    high_plane: Ref
    scales: Ref

    @classmethod
    def specs(cls, call: GPUCall, layout: Layout, pool: GMEMPool) -> "Stages":
        """Return the memory that the stages of a pool take."""
        dtype, tile = pool.pages.dtype, (call.stages, KV_TILE)
        swizzle_width = min(SWIZZLE_BYTES // dtype.itemsize, layout.run_width)
        high_plane: Spec = None
        if layout.in_planes:
            high_plane = _swizzled((*tile, layout.run_width), dtype, swizzle_width)
        scales: Spec = None
        if pool.scales is not None and layout.scales_per_slot:
            scales = plgpu.SMEM(tile, pool.scales.dtype)
        return cls(_swizzled((*tile, layout.slot_width), dtype, swizzle_width), high_plane, scales)


class Scratch(NamedTuple):
    """The shared memory and the barriers of a program.

    Attributes:
        query: [codes_per_byte, q_rows, slot_width] bfloat16.
        weights: [q_rows, KV_TILE] bfloat16.
        decoded: [KV_TILE, head_dim] bfloat16, a tile's keys and then its values, in units of their scales.
        keys: the stages of keys.
        values: the stages of values.
        query_copied: the barrier of the query's copies.
        tile_copied: [stages], the barriers of the copies to each stage.
    """

    query: Ref
    weights: Ref
    decoded: Ref
    keys: Stages
    values: Stages
    query_copied: Ref
    tile_copied: Ref

    @classmethod
    def specs(cls, call: GPUCall, keys: GMEMPool, values: GMEMPool) -> "Scratch":
        """Return the memory and the barriers that a program takes."""
        k_stages = Stages.specs(call, call.keys, keys)
        v_stages = Stages.specs(call, call.values, values)
        copied_arrays = [array for array in (*k_stages, *v_stages) if array is not None]
        swizzle_width = min(64, call.keys.run_width, call.values.run_width)
        query_shape = call.keys.codes_per_byte, call.q_rows, call.keys.slot_width
        return cls(
            query=_swizzled(query_shape, jnp.bfloat16, swizzle_width),
            weights=_swizzled((call.q_rows, KV_TILE), jnp.bfloat16, swizzle_width),
            decoded=_swizzled((KV_TILE, call.values.head_dim), jnp.bfloat16, swizzle_width),
            keys=k_stages,
            values=v_stages,
            query_copied=plgpu.Barrier(num_arrivals=call.keys.codes_per_byte),
            tile_copied=plgpu.Barrier(
                num_arrivals=len(copied_arrays) * call.copies_per_tile, num_barriers=call.stages
            ),
        )


def _swizzled(shape: tuple[int, ...], dtype: DTypeLike, swizzle_width: int) -> Spec:
    """Return shared memory in tiles of 8 by ``swizzle_width`` elements, swizzled for the tensor cores."""
    swizzle_bytes = swizzle_width * jnp.dtype(dtype).itemsize
    transforms = plgpu.TilingTransform((SWIZZLE_ROWS, swizzle_width)), plgpu.SwizzleTransform(swizzle_bytes)
    return plgpu.SMEM(shape, dtype, transforms=transforms)


@dataclass(frozen=True)
class KVRefs:
    """Keys or values within the kernel: their layout, the references to the pool and to the stages."""

    layout: Layout
    pool: GMEMPool
    stages: Stages

    @property
    def has_page_scales(self) -> bool:
        """True if the slots of a page share one scale."""
        return self.pool.scales is not None and not self.layout.scales_per_slot

    def decoded_columns(self, byte_index: int) -> Any:
        """Return the columns of ``Scratch.decoded`` that hold code number ``byte_index`` of every byte."""
        return pl.ds(byte_index * self.layout.slot_width, self.layout.slot_width)

    def load_run(self, stage: jax.Array, run: int) -> tuple[jax.Array, ...]:
        """Return a run of a tile's stored elements, and the high plane if codes are in two planes."""
        if not self.layout.in_planes:
            return (self.stages.pages[stage],)
        start = run * self.layout.run_width
        low = self.stages.pages[stage, :, start : start + self.layout.run_width]
        return low, self.stages.high_plane[stage]

    def decoded_run(self, byte_index: int, run: int) -> Any:
        """Return those of :meth:`decoded_columns` that hold one run of bytes."""
        start = byte_index * self.layout.slot_width + run * self.layout.run_width
        return pl.ds(start, self.layout.run_width)


@dataclass(frozen=True)
class Refs:
    """What the functions of the kernel share.

    Attributes:
        call: the static description of the call.
        sequence: the row of the page table.
        head: the KV head.
        first_visible: the first slot that any query of the query tile sees.
        last_visible: the last one.
        end: one past the last tile of this split.
        table: [sequences * table_pages] int32.
        keys: the keys.
        values: the values.
        scratch: the program's shared memory.
    """

    call: GPUCall
    sequence: jax.Array
    head: jax.Array
    first_visible: jax.Array
    last_visible: jax.Array
    end: jax.Array
    table: Ref
    keys: KVRefs
    values: KVRefs
    scratch: Scratch
