"""Pages in the form that JAX's own paged-attention kernels take, in ``jax.experimental.pallas.ops``.

| kernel | pages | sequences |
|---|---|---|
| ``tpu.paged_attention`` | :func:`quantized_tensors` | :func:`decode_sequences` |
| ``gpu.paged_attention`` | :func:`scaled_pages` | :func:`decode_sequences` |
| ``tpu.ragged_paged_attention`` | :func:`interleaved_pages` | :func:`ragged_sequences` |

The first two keep codes as codes. The kernels' own quantized pages are numbers of one dtype times one scale
for each slot, and a format whose values are anything else is refused:

- ``int8`` with one scale per page: a code c stands for (c + 1/2) s = (2c + 1) (s / 2), and 2c + 1 takes 9
  bits. Codes of 4 bits (``int4:page``) have room for it, and are exact.
- scales along the channels (``channel``, and groups smaller than head_dim);
- ``+offset``, which adds to a block, and ``+rotate``, which stores transformed channels.

For these, use :func:`interleaved_pages`, which decodes them, or :func:`qpaged.paged_attention`.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

from qpaged.arrays import QuantizedArray, pack
from qpaged.cache import PagedAttentionCacheView, PagedAttentionMetadata
from qpaged.implicit import materialize_nested
from qpaged.pools import Pages, Pool, as_quantized, gather_slots

if TYPE_CHECKING:
    from jax.experimental.pallas.ops.tpu.paged_attention.quantization_utils import QuantizedTensor

__all__ = [
    "RaggedSequences",
    "ScaledPages",
    "decode_sequences",
    "interleaved_pages",
    "quantized_tensors",
    "ragged_sequences",
    "scaled_pages",
]


class ScaledPages(NamedTuple):
    """The pages and scales of keys and values, named as ``gpu.paged_attention`` names its arguments.

    Attributes:
        k_pages: (kv_heads, pages, page_size, head_dim) in int8, float8_e4m3fn or float8_e5m2; in the logical
            dtype if keys are plain.
        v_pages: likewise for values.
        k_scales_pages: (kv_heads, pages, page_size) float32, the factor of each slot's numbers; None if keys
            are plain.
        v_scales_pages: likewise for values.
    """

    k_pages: jax.Array
    v_pages: jax.Array
    k_scales_pages: jax.Array | None
    v_scales_pages: jax.Array | None


class RaggedSequences(NamedTuple):
    """A step's sequences, in the order in which ``tpu.ragged_paged_attention`` takes them after the pages.

    Attributes:
        kv_lens: (sequences,) int32, the slots of each sequence.
        page_indices: (sequences, pages_per_sequence) int32, the page table; 0 for entries that are no page.
        cu_q_lens: (sequences + 1,) int32, the cumulative number of queries: sequence i has the queries
            ``cu_q_lens[i]`` to ``cu_q_lens[i + 1] - 1``.
        num_seqs: (1,) int32, the number of sequences.
    """

    kv_lens: jax.Array
    page_indices: jax.Array
    cu_q_lens: jax.Array
    num_seqs: jax.Array


def quantized_tensors(
    view: PagedAttentionCacheView,
) -> "tuple[jax.Array | QuantizedTensor, jax.Array | QuantizedTensor]":
    """Return keys and values as ``tpu.paged_attention`` takes them: its ``k_pages`` and ``v_pages``.

    A ``QuantizedTensor`` has int8 ``weight`` (kv_heads, pages, page_size, head_dim) and float32 ``scales``
    (kv_heads, pages, page_size, 1), and the kernel reads it as weight · scales / 127.5. The scales returned
    are therefore the pool's times 127.5. That is exact for scales of 16 bits or fewer (``int4``). The scales
    of ``int8:token`` use all bits of a float32, and what the kernel reads is off by at most 4 · 2^-24 of the
    value: the scale, the product and the quotient (or a reciprocal, and a product with it) are rounded.
    Values beyond 2.6e36 overflow.

    The codes of ``int8:token`` are returned without a copy; codes of fewer bits are copied, one to a byte.
    Plain pages, ``raw`` among them, are returned in the logical dtype, which the kernel rounds to bfloat16.

    The kernel does not scale its scores: multiply the query by 1 / sqrt(head_dim) first.

    Args:
        view: the layer's pages. Both pools are plain, or both are of formats whose values are int8 numbers,
            or halves of int8 numbers, times one scale for each slot or page.

    Raises:
        TypeError: the pages are implicit arrays of another class.
        ValueError: int8 numbers times one scale for each slot cannot represent the format exactly, or only
            one of the pools is plain.
    """
    from jax.experimental.pallas.ops.tpu.paged_attention.quantization_utils import MAX_INT8, QuantizedTensor

    keys, key_scales = _scaled_codes("keys", view.key_pages, (jnp.int8,))
    values, value_scales = _scaled_codes("values", view.value_pages, (jnp.int8,))
    if key_scales is None and value_scales is None:
        return keys, values
    if key_scales is None or value_scales is None:
        raise ValueError(
            f"view must hold keys and values that are both plain or both quantized, since the kernel takes "
            f"scales for both or for neither, but its keys are {_plain_or_quantized(key_scales)} and its "
            f"values {_plain_or_quantized(value_scales)}; give both the same kind of format, or take "
            f"qpaged.paged_attention."
        )
    factor = jnp.float32(MAX_INT8)
    return (
        QuantizedTensor(keys, key_scales[..., None] * factor),
        QuantizedTensor(values, value_scales[..., None] * factor),
    )


def _plain_or_quantized(scales: jax.Array | None) -> str:
    """Return what a pool with these scales is, for messages."""
    return "plain" if scales is None else "quantized"


def scaled_pages(view: PagedAttentionCacheView) -> ScaledPages:
    """Return keys and values as ``gpu.paged_attention`` takes them: numbers, and a scale for each slot.

    Exact: a number times its scale is the view's value in float32, bit for bit. Codes of 8 bits
    (``int8:token``, and ``fp8_e4m3`` and ``fp8_e5m2`` by page or token) are returned without a copy; codes of
    fewer bits are copied, one to a byte. Plain pages, ``raw`` among them, are returned in the logical dtype,
    without scales; the kernel wants the query in the same dtype.

    The kernel does not scale its scores: multiply the query by 1 / sqrt(head_dim) first.

    Args:
        view: the layer's pages. Keys and values are each plain or of a format whose values are int8,
            float8_e4m3fn or float8_e5m2 numbers, or halves of them, times one scale for each slot or page.

    Raises:
        TypeError: the pages are implicit arrays of another class.
        ValueError: such numbers times one scale for each slot cannot represent the format exactly.
    """
    dtypes = (jnp.int8, jnp.float8_e4m3fn, jnp.float8_e5m2)
    keys, key_scales = _scaled_codes("keys", view.key_pages, dtypes)
    values, value_scales = _scaled_codes("values", view.value_pages, dtypes)
    return ScaledPages(keys, values, key_scales, value_scales)


def interleaved_pages(view: PagedAttentionCacheView) -> jax.Array:
    """Return keys and values as ``tpu.ragged_paged_attention`` takes them: its ``kv_pages``.

    The pages of any format are decoded to the view's logical dtype, (pages, page_size, 2 · kv_heads,
    head_dim), with the keys of head h at 2h and its values at 2h + 1. This copies the pool. The kernel's own
    quantized pages have one scale for the whole pool, which no format here has: leave its ``k_scale`` and
    ``v_scale`` None.

    In a bfloat16 cache ``int8`` by page and ``fp8`` lose nothing: (c + 1/2) and an fp8 number have at most 8
    significant bits, and their scales are powers of two.

    Args:
        view: the layer's pages, of any format.
    """
    shape = view.metadata.pool_shape
    keys, values = _decoded(view.key_pages, shape), _decoded(view.value_pages, shape)
    heads, pages, page_size, head_dim = keys.shape
    pairs = jnp.stack([keys, values], axis=1).transpose(2, 3, 0, 1, 4)
    return pairs.reshape(pages, page_size, 2 * heads, head_dim)


def _decoded(pool: Pages, shape: tuple[int, ...]) -> jax.Array:
    """Return the pages of any kind of pool as a plain array of ``shape``."""
    if isinstance(pool, Pool):
        slots = materialize_nested(gather_slots(pool, jnp.arange(shape[1])), full=True)
        return slots.reshape(shape)
    return materialize_nested(pool, full=True)


def decode_sequences(
    view: PagedAttentionCacheView, metadata: PagedAttentionMetadata
) -> tuple[jax.Array, jax.Array]:
    """Return the sequences of a decode as ``tpu.paged_attention`` and ``gpu.paged_attention`` take them.

    Args:
        view: the layer's pages.
        metadata: a decode. All slots up to a row's position must lie on pages, because these kernels do not
            mask missing ones.

    Returns:
        ``lengths`` (batch,) int32: positions + 1, and 0 for inactive rows and positions past the page table;
        and ``page_indices`` (batch, pages_per_sequence) int32, which the GPU kernel calls ``block_tables``:
        the page table, with 0 for entries that are no page, because the kernels read from them before they
        mask.

    Raises:
        ValueError: the metadata is not a decode alone.
    """
    tokens = metadata.decodes_tokens()
    if tokens is None or not metadata.is_decode_mode():
        raise ValueError(
            f"metadata must be of a decode alone, since the kernels take one query for each sequence, but is "
            f"{_mode(metadata)}; build it with PagedAttentionMetadata.decode."
        )
    position, table = tokens
    return _lengths(view, position, table), _page_indices(view, table)


def ragged_sequences(view: PagedAttentionCacheView, metadata: PagedAttentionMetadata) -> RaggedSequences:
    """Return the sequences of a prefill or a decode as ``tpu.ragged_paged_attention`` takes them.

    The kernel takes the queries of a sequence as its last tokens, in order, and at least one slot for each
    sequence. Inactive rows and rows whose position is past the page table therefore get one slot, the first
    of their first page. Ignore the output of these rows, and of a prefill's padding.

    Args:
        view: the layer's pages.
        metadata: a prefill whose positions ascend by one and lie on pages, or a decode.

    Raises:
        ValueError: the metadata is both or neither.
    """
    prefill, decode = metadata.prefill_tokens(), metadata.decodes_tokens()
    if (prefill is None) == (decode is None):
        raise ValueError(
            f"metadata must be of a prefill or of a decode, but is {_mode(metadata)}; call the kernel once "
            f"for each, with PagedAttentionMetadata.prefill and .decode."
        )
    if decode is not None:
        position, table = decode
        starts = jnp.arange(len(position) + 1, dtype=jnp.int32)
    else:
        assert prefill is not None
        token_positions, sequence_table = prefill
        position = token_positions.max(keepdims=True, initial=-1)
        table = sequence_table[None]
        num_queries = (token_positions >= 0).sum(dtype=jnp.int32)
        starts = jnp.stack([jnp.int32(0), num_queries])
    lengths = jnp.maximum(_lengths(view, position, table), 1)
    num_seqs = jnp.full((1,), len(table), jnp.int32)
    return RaggedSequences(lengths, _page_indices(view, table), starts, num_seqs)


def _scaled_codes(
    part: str,  # "keys" or "values", for messages
    pool: Pages,  # (kv_heads, pages, page_size, head_dim)
    dtypes: Sequence[DTypeLike],
) -> tuple[jax.Array, jax.Array | None]:
    """Return numbers of one of the dtypes, and float32 scales (kv_heads, pages, page_size); None if plain."""
    quantized = as_quantized(pool)
    if quantized is None:
        if not isinstance(pool, jax.Array | np.ndarray):
            raise TypeError(
                f"view must hold plain arrays or qpaged.QuantizedArray, but its {part} are of type "
                f"{type(pool).__name__}; take interleaved_pages, which materializes them."
            )
        return jnp.asarray(pool), None
    if quantized.scales is None:
        return quantized.materialize(), None
    reason = _reason_not_scaled(quantized)
    if reason is None:
        numbers = _as_numbers(quantized, dtypes)
        if numbers is not None:
            scales = quantized.multipliers()[..., 0] / numbers.per_unit
            return numbers.array, jnp.broadcast_to(scales, quantized.shape[:3])
        reason = _magnitudes(quantized)
    names = " or ".join(jnp.dtype(dtype).name for dtype in dtypes)
    raise ValueError(
        f"view must hold pages whose values are {names} numbers times one scale for each slot, but its "
        f"{part} are {quantized.quantizer}, which {reason}; take interleaved_pages, which decodes them, or "
        f"qpaged.paged_attention, which takes every format."
    )


def _reason_not_scaled(pool: QuantizedArray) -> str | None:
    """Return why a pool's values are not decoded codes times one scale for each slot, or None."""
    if pool.quantizer.transform is not None:
        return "holds transformed channels"
    if pool.quantizer.offset is not None:
        return "adds an offset to each block"
    groups = pool.block_scales.shape[3]
    if groups > 1:
        return f"has {groups} scales along the channels"
    return None


class _Numbers(NamedTuple):
    """A pool's decoded codes in a kernel's dtype.

    Attributes:
        array: (kv_heads, pages, page_size, head_dim), the decoded codes times ``per_unit``.
        per_unit: 1, or 2 if the codes stand for halves.
    """

    array: jax.Array
    per_unit: float


def _as_numbers(pool: QuantizedArray, dtypes: Sequence[DTypeLike]) -> _Numbers | None:
    """Return a pool's decoded codes in the first dtype that represents them all; None if none does."""
    codes, values = _every_code(pool)
    for dtype in dtypes:
        # The bits of a code are those of its value: no copy is needed.
        if np.array_equal(codes.view(dtype).astype(np.float32), values, equal_nan=True):
            return _Numbers(lax.bitcast_convert_type(pool.unpacked(), dtype), 1.0)
    for dtype in dtypes:
        for per_unit in (1.0, 2.0):
            if _represents(dtype, values * per_unit):
                return _Numbers((pool.values(jnp.float32) * per_unit).astype(dtype), per_unit)
    return None


def _every_code(pool: QuantizedArray) -> tuple[np.ndarray, np.ndarray]:
    """Return every code that there is, and the float32 values that they decode to."""
    bits = pool.quantizer.bits
    with jax.ensure_compile_time_eval():
        every_code = np.arange(2**bits, dtype=np.uint8).reshape(1, 1, 1, -1)
        stored = np.asarray(pack(jnp.asarray(every_code), bits, -1)).view(pool.codes.dtype)
        array = pool.like(jnp.asarray(stored), pool.parts)
        return np.asarray(array.unpacked()), np.asarray(array.values(jnp.float32))


def _represents(dtype: DTypeLike, values: np.ndarray) -> bool:
    """Return True if all values are numbers of the dtype."""
    if jnp.issubdtype(dtype, jnp.integer):
        largest = np.float32(jnp.iinfo(dtype).max)
    else:
        largest = np.float32(jnp.finfo(dtype).max)
    if not (np.abs(values) <= largest).all():
        return False
    return np.array_equal(values.astype(dtype).astype(np.float32), values)


def _magnitudes(pool: QuantizedArray) -> str:
    """Return the range of the decoded codes, as the reason of an error."""
    sizes = np.abs(_every_code(pool)[1])
    sizes = sizes[np.isfinite(sizes) & (sizes > 0)]
    return f"reads its codes as numbers of magnitude {sizes.min():g} to {sizes.max():g}"


def _lengths(
    view: PagedAttentionCacheView,
    position: jax.Array,  # (sequences,)
    table: jax.Array,  # (sequences, pages_per_sequence)
) -> jax.Array:
    """Return the slots up to each position, that one included; 0 for a position outside the page table."""
    in_table = (position >= 0) & (position // view.metadata.page_size < table.shape[-1])
    return jnp.where(in_table, position, -1) + 1


def _page_indices(view: PagedAttentionCacheView, table: jax.Array) -> jax.Array:
    """Return the page table, with 0 for the entries that are no page."""
    return jnp.where((table >= 0) & (table < view.metadata.num_pages_per_layer), table, 0)


def _mode(metadata: PagedAttentionMetadata) -> str:
    """Return what a step consists of, for messages."""
    if metadata.is_prefill_mode():
        return "of neither" if metadata.is_decode_mode() else "of a prefill"
    return "of a decode" if metadata.is_decode_mode() else "of a prefill and a decode"
