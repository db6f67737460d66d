"""The ``gpu`` backend: a Mosaic GPU kernel for Hopper that reads pages as they are stored."""

import importlib.util

import jax
import jax.numpy as jnp

from qpaged._compat import MOSAIC_GPU_JAX, newer_jax_needed
from qpaged.arrays import compute_dtype
from qpaged.attention._layout import (
    Layout,
    join_runs,
    kernel_refusal,
    mesh_refusal,
    pad_to_multiple,
    pool_refusal,
    stored_codes,
    stored_scales,
    tile_query,
    tile_runs,
    tile_span,
    untile_rows,
    visible_range,
)
from qpaged.attention._merge import Partial
from qpaged.attention._options import Options, QueryTokens
from qpaged.pools import Pages

HEAD_DIMS = (64, 128, 256)
PAGE_SIZES = (16, 32, 64, 128, 256)
KV_TILE = 64  # slots of a tile of keys and values: the rows of a tensor core's operand
MAX_Q_ROWS = 64  # query rows of a KV head in a query tile
MAX_ACCUMULATORS = 2**13  # of a prefill's query tile: 64 registers of each of the 128 threads
Q_ROWS_MULTIPLE = 8  # tensor cores take columns, which are query rows here, eight at a time
LEAST_RUN = 32  # bytes that shared memory keeps together, and so the least of a slot's high plane
PROGRAMS = 264  # that a chip of 132 multiprocessors runs at once, two on each


def refusal() -> str | None:
    """Return why the backend takes no call at all, or None."""
    too_old = newer_jax_needed(MOSAIC_GPU_JAX)
    if too_old is not None:
        return too_old
    if importlib.util.find_spec("absl") is None:
        return "needs absl-py, which JAX's Mosaic GPU imports; pip install absl-py"
    return mesh_refusal()


def call_refusal(tokens: QueryTokens, keys: Pages, values: Pages) -> str | None:
    """Return why the backend does not take a call, or None."""
    kv_heads, _, page_size, head_dim = keys.shape
    reason = kernel_refusal(tokens, keys, values)
    if reason is not None:
        return reason
    if head_dim not in HEAD_DIMS:
        return f"takes a head_dim of {', '.join(map(str, HEAD_DIMS))}, but it is {head_dim}"
    if page_size not in PAGE_SIZES:
        return f"takes a page_size of {', '.join(map(str, PAGE_SIZES))}, but it is {page_size}"
    q_heads_per_kv = tokens.query.shape[1] // kv_heads
    if q_heads_per_kv > MAX_Q_ROWS:
        return f"takes at most {MAX_Q_ROWS} query heads of a KV head, but there are {q_heads_per_kv}"
    for name, pool in (("keys", keys), ("values", values)):
        dtype = compute_dtype(tokens.query, pool)
        if dtype != jnp.bfloat16:
            return f"{name}: computes in bfloat16, but they ask for {dtype}"
        reason = _pool_refusal(pool)
        if reason is not None:
            return f"{name}: {reason}"
    return None


def _pool_refusal(pool: Pages) -> str | None:
    reason = pool_refusal(pool, jnp.bfloat16)
    if reason is not None:
        return reason
    layout = Layout.of(pool)
    if layout.in_planes and layout.run_width < LEAST_RUN:
        return (
            f"{layout.quantizer} has codes in two planes, and the high one has {layout.run_width} bytes of a "
            f"slot; {LEAST_RUN} are the least"
        )
    if layout.quantizer is not None and layout.quantizer.state_bits is not None:
        return f"{layout.quantizer} reads its codes together with those of other bytes"
    if layout.scale_groups > 1:
        return f"{layout.quantizer} has several scales along the channels"
    return None


def attend(tokens: QueryTokens, keys: Pages, values: Pages, options: Options) -> Partial:
    """Return the attention of each token over its sequence's pages."""
    from qpaged.attention import _gpu_kernel, _gpu_refs

    k_layout, v_layout = Layout.of(keys), Layout.of(values)
    kv_heads, _, page_size, head_dim = keys.shape
    q_heads_per_kv = tokens.query.shape[1] // kv_heads
    q_tile = 1
    if tokens.run_length > 1:
        q_tile = max(1, min(MAX_Q_ROWS, MAX_ACCUMULATORS // head_dim) // q_heads_per_kv)
    used_rows = q_tile * q_heads_per_kv
    q_rows = used_rows + -used_rows % Q_ROWS_MULTIPLE
    query = tile_runs(tokens, tokens.query, q_tile, 0)
    span = tile_span(tokens, q_tile, options.sliding_window)
    position = span.last
    num_q_tiles = len(position)
    tiles_per_run = num_q_tiles // len(tokens.table)
    table = pad_to_multiple(tokens.table, max(1, KV_TILE // page_size), options.num_pages, axis=1)
    call = _gpu_refs.GPUCall(
        keys=k_layout,
        values=v_layout,
        options=options,
        num_q_tiles=num_q_tiles,
        q_rows=q_rows,
        splits=_num_splits(num_q_tiles * kv_heads, table.shape[1] * page_size // KV_TILE),
        table_pages=table.shape[1],
        tiles_per_run=tiles_per_run,
    )
    visible = visible_range(span, jnp.repeat(tokens.end, tiles_per_run))
    position = pad_to_multiple(jnp.repeat(position, q_heads_per_kv, axis=1), q_rows, -1, axis=1)
    query = pad_to_multiple(tile_query(query, kv_heads), q_rows, 0, axis=2)
    acc, row_max, row_sum = _gpu_kernel.attend(
        call,
        visible.reshape(-1),
        position,
        table.reshape(-1),
        _split_channels(query, k_layout),
        query.astype(jnp.float32).sum(axis=-1),
        _gpu_refs.GMEMPool(stored_codes(keys), _kernel_scales(keys)),
        _gpu_refs.GMEMPool(stored_codes(values), _kernel_scales(values)),
    )
    out, lse = _merge_splits(acc, row_max, row_sum)
    out = _untile_output(out[:, :, :used_rows], v_layout, q_tile)
    return join_runs(Partial(out, untile_rows(lse[:, :, :used_rows], q_tile)), tokens)


def _num_splits(programs: int, kv_tiles: int) -> int:
    """Return the splits of a sequence: as few as keep the chip at least nine tenths busy.

    Programs run in turns of ``PROGRAMS``, and a last turn that is not full leaves part of the chip idle. Two
    or three turns are not taken: if the chip runs more programs at once than that, the last turn weighs much.

    Args:
        programs: the programs of a kernel without splits.
        kv_tiles: the tiles of a row of the page table; there are at most as many splits.
    """
    for splits in range(1, kv_tiles):
        turns = -(-programs * splits // PROGRAMS)
        if 10 * programs * splits >= 9 * turns * PROGRAMS and turns not in (2, 3):
            return splits
    return kv_tiles


def _split_channels(
    query: jax.Array,  # [..., q_rows, head_dim]
    layout: Layout,
) -> jax.Array:
    """Return a query as [..., codes_per_byte, q_rows, slot_width], as codes of a byte split the channels."""
    query = query.reshape(*query.shape[:-1], layout.slot_width, layout.codes_per_byte)
    return jnp.moveaxis(query, -1, -3)


def _untile_output(
    out: jax.Array,  # [num_q_tiles, kv_heads, q_rows, head_dim], channels as the codes of a byte split them
    layout: Layout,  # of the values
    q_tile: int,
) -> jax.Array:
    """Return an output as [tokens, q_heads, head_dim]."""
    *rows, head_dim = out.shape
    out = out.reshape(*rows, layout.codes_per_byte, layout.slot_width).swapaxes(-1, -2)
    return untile_rows(out.reshape(*rows, head_dim), q_tile)


def _kernel_scales(pool: Pages) -> jax.Array | None:
    """Return a pool's scales, [kv_heads, pages] or [kv_heads, pages, page_size]; None if it has none."""
    scales = stored_scales(pool)
    if scales is None:
        return None
    if Layout.of(pool).scales_per_slot:
        return scales.reshape(scales.shape[:3])
    return scales.reshape(scales.shape[:2])


def _merge_splits(
    acc: jax.Array,  # [splits, num_q_tiles, kv_heads, head_dim, q_rows]
    row_max: jax.Array,  # [splits, num_q_tiles, kv_heads, q_rows]
    row_sum: jax.Array,  # [splits, num_q_tiles, kv_heads, q_rows]
) -> Partial:
    """Return the attention of all splits together, [num_q_tiles, kv_heads, q_rows, head_dim]."""
    highest = row_max.max(axis=0)
    alpha = jnp.exp(row_max - highest)
    acc = (acc * alpha[..., None, :]).sum(axis=0).swapaxes(-1, -2)
    return Partial.of_sums(acc, highest, (row_sum * alpha).sum(axis=0))
