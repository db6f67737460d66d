"""The ``tpu`` backend: a Pallas kernel that reads pages as they are stored, each once."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from qpaged._compat import partitioned, version_tuple
from qpaged.arrays import QuantizedArray, common_dtype, compute_dtype
from qpaged.attention._layout import Layout, bounds, padded, pool_refusal
from qpaged.attention._options import Options, Tokens
from qpaged.attention._tpu_pages import LANES, Pages

OLDEST_JAX = (0, 10)
HEAD_DIMS = (64, 128, 256)
PAGE_SIZES = (16, 32, 64, 128, 256)
BUFFERS = 2**22  # bytes of two blocks of pages
BLOCK = 512  # slots of a block, if the buffers hold them
STATE = 2**20  # bytes of a tile's sums
ROWS = 256  # queries of a KV head in a tile
SCALES = 2**17  # bytes of scales gathered for one call, if one sequence has no more
TABLE = 2**16  # entries of the page table in scalar memory, likewise


def refusal() -> str | None:
    """Why the backend takes no call at all; None if it does."""
    if version_tuple(jax.__version__) < OLDEST_JAX:
        return f"needs JAX {'.'.join(map(str, OLDEST_JAX))} or newer, but this is {jax.__version__}"
    if partitioned():
        return "is not partitioned by the compiler, as the mesh's Auto axes ask; call it within jax.shard_map"
    return None


def call_refusal(tokens: Tokens, keys: Any, values: Any) -> str | None:
    """Why the backend does not take a call; None if it does."""
    page_size, head_dim = keys.shape[2:]
    if head_dim not in HEAD_DIMS:
        return f"takes a head_dim of {', '.join(map(str, HEAD_DIMS))}, but it is {head_dim}"
    if page_size not in PAGE_SIZES:
        return f"takes a page_size of {', '.join(map(str, PAGE_SIZES))}, but it is {page_size}"
    for name, pool in (("keys", keys), ("values", values)):
        reason = _pool_refusal(pool)
        if reason is not None:
            return f"{name}: {reason}"
    if _block(keys.shape[0], Pages.of(keys), Pages.of(values)) is None:
        return f"has no room for the pages of {keys.shape[0]} KV heads in a chip's fast memory"
    return None


def _pool_refusal(pool: Any) -> str | None:
    if not isinstance(pool, QuantizedArray):
        floats = isinstance(pool, jax.Array) and pool.dtype in (jnp.bfloat16, jnp.float32)
        return None if floats else f"pages of {getattr(pool, 'dtype', type(pool).__name__)} are not taken"
    layout = Layout.of(pool)
    if layout.shifted and layout.per_slot and layout.groups > 1:
        return f"{pool.quantizer} has offsets of groups"
    return pool_refusal(pool, jnp.float32 if layout.groups else pool.dtype)


def attend(tokens: Tokens, keys: Any, values: Any, sinks: jax.Array | None, options: Options) -> jax.Array:
    """Attention of each token over its sequence's pages, (n, q_heads, head_dim) float32."""
    dtype = common_dtype(compute_dtype(tokens.query, keys), compute_dtype(tokens.query, values))
    dtype = dtype if dtype == jnp.bfloat16 else jnp.float32
    tokens = dataclasses.replace(tokens, query=tokens.query.astype(dtype))
    if tokens.is_prefill:
        return _call(tokens, keys, values, sinks, options)
    rows, pages = tokens.table.shape
    bytes_each = sum(
        0 if pool.scales is None else pool.scales.nbytes // pool.shape[1] * pages
        for pool in (keys, values)
        if isinstance(pool, QuantizedArray)
    )
    at_once = max(1, min(rows, TABLE // pages, SCALES // max(1, bytes_each)))
    if at_once == rows:
        return _call(tokens, keys, values, sinks, options)
    whole = Tokens(
        padded(tokens.query, at_once, 0),
        padded(tokens.position, at_once, -1),
        padded(tokens.table, at_once, 0),
    )
    chunks = jax.tree_util.tree_map(lambda x: x.reshape(-1, at_once, *x.shape[1:]), whole)
    out = lax.map(lambda chunk: _call(chunk, keys, values, sinks, options), chunks)
    return out.reshape(-1, *out.shape[2:])[:rows]


def _call(tokens: Tokens, keys: Any, values: Any, sinks: jax.Array | None, options: Options) -> jax.Array:
    from qpaged.attention import _tpu_kernel

    layouts = Pages.of(keys), Pages.of(values)
    heads, _, page_size, head_dim = keys.shape
    group = tokens.query.shape[1] // heads
    block = _block(heads, *layouts)
    each = _tile(heads, group, layouts) if tokens.is_prefill else 1
    query = padded(tokens.query, each, 0)
    position = padded(tokens.position, each, -1)
    tiles = len(position) // each
    table = jnp.atleast_2d(tokens.table)
    missing = -table.shape[1] % (block // page_size)
    table = jnp.pad(table, ((0, 0), (0, missing)), constant_values=options.num_pages)
    plan = _tpu_kernel.Plan(
        *layouts, options, tiles, each, group, block // page_size, table.shape[1], tokens.is_prefill
    )
    seen = bounds(position.reshape(tiles, each), options.sliding_window)
    query = query.reshape(tiles, each, heads, group, head_dim).swapaxes(1, 2)
    query = layouts[0].spread(query.reshape(tiles, heads, each * group, head_dim)).swapaxes(2, 3)
    if sinks is not None:
        sinks = jnp.tile(sinks.reshape(heads, group), each).reshape(heads, each * group, 1)
    pools = [
        _tpu_kernel.Pool(layout.rows_of(pool), layout.scales_of(pool, table, plan.pages))
        for layout, pool in zip(layouts, (keys, values), strict=True)
    ]
    out = _tpu_kernel.attend(plan, seen.reshape(-1), position, table.reshape(-1), query, sinks, *pools)
    out = layouts[1].gathered(out.swapaxes(2, 3)).reshape(tiles, heads, each, group, head_dim)
    return out.swapaxes(1, 2).reshape(tiles * each, heads * group, head_dim)[: len(tokens.query)]


def _block(heads: int, *layouts: Pages) -> int | None:
    """Slots of a block: as many as two buffers of keys and of values hold; None if they do not hold one."""
    slot = sum(heads * layout.stored_bytes for layout in layouts)
    least = max(LANES * max(layout.folds for layout in layouts), layouts[0].page_size)
    block = max(BLOCK, least)
    while block > least and 2 * block * slot > BUFFERS:
        block //= 2
    return block if 2 * block * slot <= 2 * BUFFERS else None


def _tile(heads: int, group: int, layouts: tuple[Pages, Pages]) -> int:
    """Queries of a prefill's tile."""
    row = heads * max(layout.places * layout.lanes for layout in layouts) * 4
    return max(1, min(ROWS, STATE // row) // group)
