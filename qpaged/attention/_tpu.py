"""The ``tpu`` backend: a Pallas kernel that reads each page once, as it is stored."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from qpaged._compat import PALLAS_TPU_JAX, newer_jax_needed
from qpaged.arrays import LANES, common_dtype, compute_dtype
from qpaged.arrays._lane_rows import count_slots_per_row
from qpaged.attention._layout import (
    join_runs,
    kernel_refusal,
    mesh_refusal,
    pad_to_multiple,
    pool_refusal,
    stored_scales,
    tile_query,
    tile_runs,
    tile_span,
    untile_rows,
    visible_range,
)
from qpaged.attention._merge import Partial
from qpaged.attention._options import Options, QueryTokens
from qpaged.attention._tpu_layout import TPULayout
from qpaged.pools import Pages

HEAD_DIMS = (64, 128, 256)
PAGE_SIZES = (16, 32, 64, 128, 256)
KV_TILE = 512  # slots of a tile of keys and values, if the buffers hold them
BUFFER_BYTES = 2**22  # of the two buffers of keys and of values
MAX_Q_ROWS = 256  # query rows of a KV head in a query tile
STATE_BYTES = 2**20  # of a query tile's accumulators
SCALE_BYTES = 2**17  # of the scales gathered for one call of the kernel, if one sequence does not have more
TABLE_ENTRIES = 2**16  # of the page table in scalar memory, likewise


def refusal() -> str | None:
    """Return why the backend takes no call at all, or None."""
    return newer_jax_needed(PALLAS_TPU_JAX) or mesh_refusal()


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
    for name, pool in (("keys", keys), ("values", values)):
        reason = _pool_refusal(pool)
        if reason is not None:
            return f"{name}: {reason}"
    if _kv_tile(kv_heads, TPULayout.of(keys), TPULayout.of(values)) is None:
        return f"has no room for the pages of {kv_heads} KV heads in a chip's fast memory"
    return None


def _pool_refusal(pool: Pages) -> str | None:
    layout = TPULayout.of(pool)
    if layout.quantizer is None:
        if isinstance(pool, jax.Array) and pool.dtype in (jnp.bfloat16, jnp.float32):
            return None
        return f"pages of {pool.dtype} are not taken"
    if layout.in_planes and count_slots_per_row((layout.page_size, layout.slot_bytes), True) == 1:
        return (
            f"{layout.quantizer} has codes in two planes, which do not fill rows of lanes on pages of "
            f"{layout.page_size} slots; take larger pages"
        )
    if layout.has_offset and layout.scales_per_slot and layout.scale_groups > 1:
        return f"{layout.quantizer} has offsets of groups"
    return pool_refusal(pool, layout.decode_dtype)


def attend(tokens: QueryTokens, keys: Pages, values: Pages, options: Options) -> Partial:
    """Return the attention of each token over its sequence's pages."""
    dtype = common_dtype(compute_dtype(tokens.query, keys), compute_dtype(tokens.query, values))
    if dtype != jnp.bfloat16:
        dtype = jnp.float32
    tokens = dataclasses.replace(tokens, query=tokens.query.astype(dtype))
    count = len(tokens.query)
    runs_per_call = _runs_per_call(tokens, keys, values)
    if runs_per_call == len(tokens.table):
        return _call_kernel(tokens, keys, values, options)

    def attend_chunk(chunk: QueryTokens) -> Partial:
        return _call_kernel(chunk, keys, values, options)

    tokens_per_call = runs_per_call * tokens.run_length
    chunks = QueryTokens(
        _chunks(tokens.query, tokens_per_call, 0),
        _chunks(tokens.position, tokens_per_call, -1),
        _chunks(tokens.table, runs_per_call, 0),
        _chunks(tokens.end, runs_per_call, 0),
    )
    out, lse = lax.map(attend_chunk, chunks)  # [chunks, tokens_per_call, ...]
    return Partial(out.reshape(-1, *out.shape[2:])[:count], lse.reshape(-1, *lse.shape[2:])[:count])


def _chunks(array: jax.Array, size: int, fill: int) -> jax.Array:
    """Return an array [n, ...] as [chunks, size, ...], the last one filled up."""
    return pad_to_multiple(array, size, fill).reshape(-1, size, *array.shape[1:])


def _runs_per_call(tokens: QueryTokens, keys: Pages, values: Pages) -> int:
    """Return the runs whose page tables and scales one call of the kernel holds, at least one."""
    runs, table_pages = tokens.table.shape
    scale_bytes = max(1, _scale_bytes(keys, table_pages) + _scale_bytes(values, table_pages))
    return max(1, min(runs, TABLE_ENTRIES // table_pages, SCALE_BYTES // scale_bytes))


def _scale_bytes(pool: Pages, pages: int) -> int:
    """Return the bytes of the scales of ``pages`` pages."""
    scales = stored_scales(pool)
    if scales is None:
        return 0
    return scales.nbytes // pool.shape[1] * pages


def _call_kernel(tokens: QueryTokens, keys: Pages, values: Pages, options: Options) -> Partial:
    """Return :func:`attend` in one call of the kernel."""
    from qpaged.attention import _tpu_kernel, _tpu_refs

    k_layout, v_layout = TPULayout.of(keys), TPULayout.of(values)
    kv_heads, _, page_size, _ = keys.shape
    q_heads_per_kv = tokens.query.shape[1] // kv_heads
    kv_tile = _kv_tile(kv_heads, k_layout, v_layout)
    assert kv_tile is not None  # call_refusal says so
    q_tile = 1
    if tokens.run_length > 1:
        q_tile = _q_tile(kv_heads, q_heads_per_kv, k_layout, v_layout)
    query = tile_runs(tokens, tokens.query, q_tile, 0)
    span = tile_span(tokens, q_tile, options.sliding_window)
    position = span.last
    num_q_tiles = len(position)
    tiles_per_run = num_q_tiles // len(tokens.table)
    table = pad_to_multiple(tokens.table, kv_tile // page_size, options.num_pages, axis=1)
    call = _tpu_refs.TPUCall(
        keys=k_layout,
        values=v_layout,
        options=options,
        num_q_tiles=num_q_tiles,
        q_tile=q_tile,
        q_heads_per_kv=q_heads_per_kv,
        pages_per_tile=kv_tile // page_size,
        table_pages=table.shape[1],
        tiles_per_run=tiles_per_run,
    )
    visible = visible_range(span, jnp.repeat(tokens.end, tiles_per_run))
    query = k_layout.repeat_for_slots(tile_query(query, kv_heads)).swapaxes(2, 3)
    k_scales = k_layout.gather_scales(keys, table, call.pages_per_tile)
    v_scales = v_layout.gather_scales(values, table, call.pages_per_tile)
    out, lse = _tpu_kernel.attend(
        call,
        visible.reshape(-1),
        position.reshape(-1),
        table.reshape(-1),
        query,
        _tpu_refs.HBMPool(k_layout.page_rows_of(keys), k_scales),
        _tpu_refs.HBMPool(v_layout.page_rows_of(values), v_scales),
    )
    out = v_layout.sum_over_slots(out.swapaxes(2, 3))  # [num_q_tiles, kv_heads, q_rows, head_dim]
    return join_runs(Partial(untile_rows(out, q_tile), untile_rows(lse, q_tile)), tokens)


def _kv_tile(kv_heads: int, k_layout: TPULayout, v_layout: TPULayout) -> int | None:
    """Return the slots of a tile: as many as two buffers hold, or None if they do not hold the least."""
    slot_bytes = kv_heads * (k_layout.slot_bytes + v_layout.slot_bytes)
    # A tile's slots of keys, and of values, have at least 128 rows: the lanes of the scores.
    least = max(LANES * max(k_layout.slots_per_row, v_layout.slots_per_row), k_layout.page_size)
    kv_tile = max(KV_TILE, least)
    while kv_tile > least and 2 * kv_tile * slot_bytes > BUFFER_BYTES:
        kv_tile //= 2
    if 2 * kv_tile * slot_bytes > 2 * BUFFER_BYTES:
        return None
    return kv_tile


def _q_tile(kv_heads: int, q_heads_per_kv: int, k_layout: TPULayout, v_layout: TPULayout) -> int:
    """Return the queries of a run's query tile: as many as the state has room for."""
    k_width = k_layout.codes_per_byte * k_layout.row_width
    v_width = v_layout.codes_per_byte * v_layout.row_width
    row_bytes = kv_heads * max(k_width, v_width) * jnp.dtype(jnp.float32).itemsize
    return max(1, min(MAX_Q_ROWS, STATE_BYTES // row_bytes) // q_heads_per_kv)
