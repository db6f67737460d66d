"""How a pool is stored, as the two kernels read it, and what else they share.

The kernels take a pool apart only here.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from qpaged._compat import compiler_partitions_mesh
from qpaged.arrays import (
    codes_together,
    extract_codes,
    extract_states,
    has_planes,
    join_planes,
    not_elementwise,
)
from qpaged.attention._merge import Partial
from qpaged.attention._options import QueryTokens, Span
from qpaged.pools import Pages, Pool, as_quantized


@dataclass(frozen=True)
class Layout:
    """The static description of a pool [kv_heads, pages, page_size, head_dim].

    Attributes:
        quantizer: the pool's format; None for a plain pool.
        dtype: the logical dtype.
        page_size: slots of a page.
        head_dim: channels of a slot.
        slot_bytes: bytes of a slot's stored elements.
        codes_per_byte: codes in a stored element, or in one of the low plane; channel c is code number
            c mod codes_per_byte of its byte.
        scale_groups: scales along the channels; 0 if the format has no scales.
        scales_per_slot: True if every slot has scales of its own, False if the slots of a page share them.
        has_offset: True if a scale also carries an offset that is added to its block.
    """

    quantizer: Any  # Quantizer | None; a plain pool's is never called
    dtype: DTypeLike
    page_size: int
    head_dim: int
    slot_bytes: int
    codes_per_byte: int = 1
    scale_groups: int = 0
    scales_per_slot: bool = False
    has_offset: bool = False

    @classmethod
    def of(cls, pool: Pages) -> Self:
        """Return the layout of a plain or quantized pool."""
        _, _, page_size, head_dim = pool.shape
        quantized = as_quantized(pool)
        if quantized is None:
            slot_bytes = head_dim * jnp.dtype(pool.dtype).itemsize
            return cls(None, pool.dtype, page_size, head_dim, slot_bytes)
        scale_groups, scales_per_slot, has_offset = 0, False, False
        if quantized.scales is not None:
            scale_groups = quantized.scales.shape[3]
            scales_per_slot = quantized.scales.shape[2] > 1
            has_offset = quantized.quantizer.offset is not None
        return cls(
            quantizer=quantized.quantizer,
            dtype=pool.dtype,
            page_size=page_size,
            head_dim=head_dim,
            slot_bytes=quantized.codes.shape[3] * quantized.stored.dtype.itemsize,
            codes_per_byte=quantized.codes_per_byte,
            scale_groups=scale_groups,
            scales_per_slot=scales_per_slot,
            has_offset=has_offset,
        )

    @property
    def slot_width(self) -> int:
        """Stored elements of a slot; of codes in two planes, those of the low one."""
        return self.head_dim // self.codes_per_byte

    @property
    def in_planes(self) -> bool:
        """True if codes are stored in two planes."""
        return self.quantizer is not None and has_planes(self.quantizer.bits)

    @property
    def runs(self) -> int:
        """Runs of stored elements of a slot that share the bytes of the high plane; 1 if there is none."""
        return codes_together(self.quantizer.bits) // self.codes_per_byte if self.in_planes else 1

    @property
    def run_width(self) -> int:
        """Stored elements of a run, and bytes of a slot's high plane."""
        return self.slot_width // self.runs

    def codes_of_run(self, planes: Sequence[jax.Array], byte_index: int, run: int) -> jax.Array:
        """Return code number ``byte_index`` of each stored element of a run; within a kernel.

        Args:
            planes: the run, and the high plane if there is one.
            byte_index: which code of a byte.
            run: which run; the first is 0.
        """
        if not self.in_planes:
            return self.codes(planes[0], byte_index)
        low, high = (plane.astype(jnp.int32) for plane in planes)
        code_dtype = self.quantizer.code_dtype(self.dtype)
        return join_planes(low, high, self.quantizer.bits, byte_index, run, code_dtype)

    def codes(self, stored: jax.Array, byte_index: int) -> jax.Array:
        """Return code, or state, ``byte_index`` of each stored element of whole slots; within a kernel."""
        if self.codes_per_byte == 1:
            return stored
        quantizer, slots = self.quantizer, stored.shape[-1] // self.slot_bytes
        if quantizer.state_bits is not None:
            stored = stored.astype(jnp.int32)
            return extract_states(stored, quantizer.bits, quantizer.state_bits, byte_index, slots)
        code_dtype = quantizer.code_dtype(self.dtype)
        return extract_codes(stored.astype(jnp.int32), quantizer.bits, byte_index, code_dtype, slots=slots)


def stored_codes(pool: Pages) -> jax.Array:
    """Return a pool's codes [kv_heads, pages, page_size, slot_width], or the pages of a plain pool."""
    quantized = as_quantized(pool)
    return pool if quantized is None else quantized.codes


def stored_rows(pool: Pages) -> jax.Array:
    """Return :func:`stored_codes` as they lie in memory, where several short slots may share a row."""
    quantized = as_quantized(pool)
    return pool if quantized is None else quantized.stored


def stored_scales(pool: Pages) -> jax.Array | None:
    """Return the scales of a pool, [kv_heads, pages, page_size or 1, scale_groups]; None if it has none.

    Static scales are repeated for each page, as the kernels read them: 4 bytes beside those of the page.
    """
    quantized = as_quantized(pool)
    if quantized is None or not quantized.quantizer.has_static_scales:
        return None if quantized is None else quantized.scales
    return jnp.broadcast_to(quantized.block_scales, (*pool.shape[:2], 1, 1))


def mesh_refusal() -> str | None:
    """Return why no kernel is in a program that the compiler divides over a mesh, or None."""
    if compiler_partitions_mesh():
        return "is not partitioned by the compiler, as the mesh's Auto axes ask; call it within jax.shard_map"
    return None


def kernel_refusal(tokens: QueryTokens, keys: Pages, values: Pages) -> str | None:
    """Return why no kernel takes such a mask, or keys and values of these sizes; else None."""
    if tokens.slopes is not None:
        return "knows no ALiBi slopes"
    if tokens.span is not None:
        return "takes a sliding window that is known when the call is traced, and then no visible_until"
    if keys.shape != values.shape:
        return f"takes keys and values of one head_dim, but they have {keys.shape[3]} and {values.shape[3]}"
    return None


def pool_refusal(pool: Pages, decode_dtype: DTypeLike) -> str | None:
    """Return why no kernel takes the format of a pool whose codes decode to ``decode_dtype``, or None."""
    quantized = as_quantized(pool)
    if quantized is None:
        return f"pages of type {type(pool).__name__} are not taken" if isinstance(pool, Pool) else None
    quantizer = quantized.quantizer
    if quantized.global_scale is not None:
        return f"{quantizer} has scales of two levels"
    if quantized.offset is not None:
        return f"{quantizer} comes from a lazy read, with offsets beside its scales"
    if not quantizer.elementwise:
        return f"{quantizer} is declared not to be elementwise"

    def decode(codes: jax.Array) -> jax.Array:
        return quantizer.decode(codes, decode_dtype)

    methods: dict[str, tuple[Callable[[Any], Any], DTypeLike]] = {}
    methods["decode"] = decode, quantizer.code_dtype(pool.dtype)
    if quantized.scales is not None:
        methods["multiplier"] = quantizer.multiplier, quantized.scales.dtype
        if quantizer.offset is not None:
            methods["offset"] = quantizer.offset.from_scales, quantized.scales.dtype
    for name, (method, argument_dtype) in methods.items():
        reason = not_elementwise(method, argument_dtype)
        if reason is not None:
            return f"{name} of {quantizer} {reason}"
    return None


def pad_to_multiple(array: jax.Array, multiple: int, fill: int, axis: int = 0) -> jax.Array:
    """Return ``array`` with ``fill`` appended along ``axis`` up to a multiple."""
    missing = -array.shape[axis] % multiple
    if not missing:
        return array
    widths = [(0, 0)] * array.ndim
    widths[axis] = (0, missing)
    return jnp.pad(array, widths, constant_values=fill)


def tile_runs(
    tokens: QueryTokens,
    of_tokens: jax.Array,  # [tokens, ...]
    q_tile: int,
    fill: int,
) -> jax.Array:
    """Return something of each token in query tiles, [num_q_tiles, q_tile, ...]: as many for each run."""
    padded = pad_to_multiple(tokens.by_run(of_tokens), q_tile, fill, axis=1)
    return padded.reshape(-1, q_tile, *padded.shape[2:])


def tile_span(tokens: QueryTokens, q_tile: int, window: int | None) -> Span:
    """Return the span of each token in query tiles, [num_q_tiles, q_tile]."""
    span = tokens.span_within(window)
    return Span(tile_runs(tokens, span.first, q_tile, 0), tile_runs(tokens, span.last, q_tile, -1))


def join_runs(partial: Partial, tokens: QueryTokens) -> Partial:
    """Return the attention of the tokens from that of their tiles, [num_q_tiles * q_tile, ...]."""

    def join(part: jax.Array) -> jax.Array:
        by_run = part.reshape(len(tokens.table), -1, *part.shape[1:])[:, : tokens.run_length]
        return by_run.reshape(len(tokens.query), *part.shape[1:])

    return Partial(*map(join, partial))


def tile_query(
    query: jax.Array,  # [num_q_tiles, q_tile, q_heads, head_dim]
    kv_heads: int,
) -> jax.Array:
    """Return a query as [num_q_tiles, kv_heads, q_rows, head_dim], where q_rows = q_tile * q_heads_per_kv."""
    num_q_tiles, q_tile, q_heads, head_dim = query.shape
    q_heads_per_kv = q_heads // kv_heads
    query = query.reshape(num_q_tiles, q_tile, kv_heads, q_heads_per_kv, head_dim).swapaxes(1, 2)
    return query.reshape(num_q_tiles, kv_heads, q_tile * q_heads_per_kv, head_dim)


def untile_rows(
    rows: jax.Array,  # [num_q_tiles, kv_heads, q_rows, ...]
    q_tile: int,
) -> jax.Array:
    """Return something of each query row as [tokens, q_heads, ...], the inverse of :func:`tile_query`."""
    num_q_tiles, kv_heads, q_rows, *rest = rows.shape
    q_heads_per_kv = q_rows // q_tile
    rows = rows.reshape(num_q_tiles, kv_heads, q_tile, q_heads_per_kv, *rest).swapaxes(1, 2)
    return rows.reshape(num_q_tiles * q_tile, kv_heads * q_heads_per_kv, *rest)


def visible_range(
    span: Span,  # of [q_tiles, queries]
    end: jax.Array,  # [q_tiles]
) -> jax.Array:
    """Return the first and the last slot that any query of a tile sees, [q_tiles, 2]; 0 and -1 for none."""
    last = jnp.minimum(span.last.max(axis=1), end - 1)
    first = jnp.where(span.last >= 0, span.first, span.last.max(axis=1, keepdims=True)).min(axis=1)
    sees_any = first <= last
    return jnp.stack([jnp.where(sees_any, first, 0), jnp.where(sees_any, last, -1)], axis=1)
