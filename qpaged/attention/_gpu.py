"""The ``gpu`` backend: a Mosaic GPU kernel for Hopper that reads pages as they are stored."""

import importlib.util
from typing import Any

import jax
import jax.numpy as jnp

from qpaged._compat import partitioned, version_tuple
from qpaged.arrays import QuantizedArray, compute_dtype
from qpaged.attention._layout import Layout, bounds, padded, pool_refusal
from qpaged.attention._options import Options, Tokens

OLDEST_JAX = (0, 11)  # its interpreter is what the kernel is tested in
HEAD_DIMS = (64, 128, 256)
PAGE_SIZES = (16, 32, 64, 128, 256)
ROWS = SLOTS = 64  # query rows of a tile at most, slots of a block
SUMS = 2**13  # of a prefill's tile, 64 in each thread's registers
EIGHT = 8  # rows that the tensor cores take at once
PROGRAMS = 264  # as many as a chip of 132 multiprocessors runs at once, two on each


def refusal() -> str | None:
    """Why the backend takes no call at all; None if it does."""
    if version_tuple(jax.__version__) < OLDEST_JAX:
        return f"needs JAX {'.'.join(map(str, OLDEST_JAX))} or newer, but this is {jax.__version__}"
    if importlib.util.find_spec("absl") is None:
        return "needs absl-py, which JAX's Mosaic GPU imports; pip install absl-py"
    if partitioned():
        return "is not partitioned by the compiler, as the mesh's Auto axes ask; call it within jax.shard_map"
    return None


def call_refusal(tokens: Tokens, keys: Any, values: Any) -> str | None:
    """Why the backend does not take a call; None if it does."""
    heads, _, page_size, head_dim = keys.shape
    if head_dim not in HEAD_DIMS:
        return f"takes a head_dim of {', '.join(map(str, HEAD_DIMS))}, but it is {head_dim}"
    if page_size not in PAGE_SIZES:
        return f"takes a page_size of {', '.join(map(str, PAGE_SIZES))}, but it is {page_size}"
    if tokens.query.shape[1] // heads > ROWS:
        return (
            f"takes at most {ROWS} query heads of a KV head, but there are {tokens.query.shape[1] // heads}"
        )
    for name, pool in (("keys", keys), ("values", values)):
        if compute_dtype(tokens.query, pool) != jnp.bfloat16:
            return f"{name}: computes in bfloat16, but they ask for {compute_dtype(tokens.query, pool)}"
        reason = _pool_refusal(pool)
        if reason is not None:
            return f"{name}: {reason}"
    return None


def _pool_refusal(pool: Any) -> str | None:
    if not isinstance(pool, QuantizedArray):
        return None
    reason = pool_refusal(pool, jnp.bfloat16)
    if reason is None and Layout.of(pool).groups > 1:
        return f"{pool.quantizer} has several scales along the channels"
    return reason


def attend(tokens: Tokens, keys: Any, values: Any, sinks: jax.Array | None, options: Options) -> jax.Array:
    """Attention of each token over its sequence's pages, (n, q_heads, head_dim) float32."""
    from qpaged.attention import _gpu_kernel

    layouts = Layout.of(keys), Layout.of(values)
    heads, _, page_size, head_dim = keys.shape
    group = tokens.query.shape[1] // heads
    each = max(1, min(ROWS, SUMS // head_dim) // group) if tokens.is_prefill else 1
    rows = each * group + -(each * group) % EIGHT
    query, position = padded(tokens.query, each, 0), padded(tokens.position, each, -1)
    tiles = len(position) // each
    table = jnp.atleast_2d(tokens.table)
    missing = -table.shape[1] % max(1, SLOTS // page_size)
    table = jnp.pad(table, ((0, 0), (0, missing)), constant_values=options.num_pages)
    blocks = table.shape[1] * page_size // SLOTS
    splits = _splits(tiles * heads, blocks)
    plan = _gpu_kernel.Plan(*layouts, options, tiles, rows, splits, table.shape[1], tokens.is_prefill)

    seen = bounds(position.reshape(tiles, each), options.sliding_window)
    position = padded(jnp.repeat(position.reshape(tiles, each), group, axis=1).T, rows, -1).T
    query = query.reshape(tiles, each, heads, group, head_dim).swapaxes(1, 2)
    query = query.reshape(tiles, heads, each * group, head_dim)
    query = jnp.pad(query, ((0, 0), (0, 0), (0, rows - each * group), (0, 0)))
    k, v = [pool.codes if isinstance(pool, QuantizedArray) else pool for pool in (keys, values)]
    sums, tops, totals = _gpu_kernel.attend(
        plan,
        seen.reshape(-1),
        position,
        table.reshape(-1),
        _places(query, layouts[0]),
        query.astype(jnp.float32).sum(axis=-1),
        k,
        v,
        [_scales(pool, layout) for pool, layout in zip((keys, values), layouts, strict=True)],
    )
    if sinks is not None:
        sinks = jnp.tile(sinks.reshape(heads, group), (1, each))
        sinks = jnp.pad(sinks, ((0, 0), (0, rows - sinks.shape[1])))
    out = _merged(sums, tops, totals, sinks)[..., : each * group]  # (tiles, heads, head_dim, rows)
    out = out.reshape(tiles, heads, layouts[1].places, layouts[1].width, each, group)
    out = out.transpose(0, 4, 1, 5, 3, 2)
    return out.reshape(tiles * each, heads * group, head_dim)[: len(tokens.query)]


def _splits(tiles: int, blocks: int) -> int:
    """Shares of a sequence: as few as leave a tenth of the chip idle at most, in one turn or in many.

    Of two or three turns the last counts for much where the chip runs more than ``PROGRAMS`` at once."""
    for splits in range(1, blocks):
        turns = -(-tiles * splits // PROGRAMS)
        if 10 * tiles * splits >= 9 * turns * PROGRAMS and turns not in (2, 3):
            return splits
    return blocks


def _places(query: jax.Array, layout: Layout) -> jax.Array:
    """(..., rows, head_dim) as (..., places, rows, width): the channels of each place of a byte."""
    return jnp.moveaxis(query.reshape(*query.shape[:-1], layout.width, layout.places), -1, -3)


def _scales(pool: Any, layout: Layout) -> jax.Array | None:
    """The scales as they lie, (kv_heads, pages) or (kv_heads, pages, page_size)."""
    if not layout.groups:
        return None
    return pool.scales.reshape(pool.scales.shape[: 3 if layout.per_slot else 2])


def _merged(sums: jax.Array, tops: jax.Array, totals: jax.Array, sinks: jax.Array | None) -> jax.Array:
    """What the splits of each tile come to together, with the sink, that takes weight and gives nothing."""
    top = tops.max(axis=0)
    top = top if sinks is None else jnp.maximum(top, sinks)
    fade = jnp.exp(tops - top)
    total = (totals * fade).sum(axis=0)
    total = total if sinks is None else total + jnp.exp(sinks - top)
    weight = jnp.where(total > 0, total, 1)[..., None, :]
    return (sums * fade[..., None, :]).sum(axis=0) / weight
