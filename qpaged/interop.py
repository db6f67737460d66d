"""Pages as JAX's own paged-attention kernels take them, in ``jax.experimental.pallas.ops``.

| kernel | pages | sequences |
|---|---|---|
| ``tpu.paged_attention`` | :func:`quantized_tensors` | :func:`decode_sequences` |
| ``gpu.paged_attention`` | :func:`scaled_pages` | :func:`decode_sequences` |
| ``tpu.ragged_paged_attention`` | :func:`interleaved_pages` | :func:`ragged_sequences` |

The first two keep codes as codes, and refuse formats that the kernel's arithmetic cannot read exactly. The
kernels' own quantized pages are numbers of one dtype times one scale for each slot, and these formats are
more than that:

- ``int8`` with one scale per page: its codes read as (c + 1/2) s, that is (2c + 1) times s / 2, and 2c + 1
  takes 9 bits. With codes of 4 bits (``int4:page``) it fits, and is exact.
- scales along the channels (``channel``, and groups smaller than head_dim);
- ``+offset``, which adds to a block, and ``+rotate``, whose blocks hold other channels than the query has.

Decode those with :func:`interleaved_pages`, or leave them as they are to :func:`qpaged.paged_attention`.
"""

from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from qpaged.arrays import QuantizedArray
from qpaged.cache import PagedAttentionCacheView, PagedAttentionMetadata
from qpaged.implicit import ImplicitArray, materialize_nested

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
    """Pools and their scales, named as ``gpu.paged_attention`` names its arguments.

    Attributes:
        k_pages: (kv_heads, pages, page_size, head_dim) in int8, float8_e4m3fn or float8_e5m2; in the logical
            dtype where keys are plain.
        v_pages: likewise, of the values.
        k_scales_pages: (kv_heads, pages, page_size) float32, what a slot's numbers are multiplied by; None
            where keys are plain.
        v_scales_pages: likewise, of the values.
    """

    k_pages: jax.Array
    v_pages: jax.Array
    k_scales_pages: jax.Array | None
    v_scales_pages: jax.Array | None


class RaggedSequences(NamedTuple):
    """A step's sequences, in the order in which ``tpu.ragged_paged_attention`` takes them after the pages.

    Attributes:
        kv_lens: (sequences,) int32, slots of each.
        page_indices: (sequences, pages_per_sequence) int32, pages of each; 0 where there is none.
        cu_q_lens: (sequences + 1,) int32, where each one's queries begin, and the end of the last.
        num_seqs: (1,) int32, how many there are.
    """

    kv_lens: jax.Array
    page_indices: jax.Array
    cu_q_lens: jax.Array
    num_seqs: jax.Array


def quantized_tensors(
    view: PagedAttentionCacheView,
) -> "tuple[jax.Array | QuantizedTensor, jax.Array | QuantizedTensor]":
    """Keys and values as ``tpu.paged_attention`` takes them: its ``k_pages`` and ``v_pages``.

    A ``QuantizedTensor`` has int8 ``weight`` (kv_heads, pages, page_size, head_dim) and float32 ``scales``
    (kv_heads, pages, page_size, 1), and reads as weight · scales / 127.5, so that ours are multiplied by
    127.5. With scales of 16 bits or fewer (``int4``) that is exact. With those of ``int8:token``, which have
    all bits of a float32, what the kernel reads is off by at most 4 · 2^-24 of the value: a rounding each of
    the scale, of the product, and of the quotient, or of a reciprocal and of a product with it. Values beyond
    2.6e36 overflow in the product.

    ``int8:token`` keeps its codes where they lie; codes of fewer bits come one a byte, as a copy. Plain pages
    (``raw``, too) come as arrays in the logical dtype, which the kernel rounds to bfloat16.

    The kernel multiplies queries with keys and nothing else: scale the query by 1 / sqrt(head_dim).

    Args:
        view: the layer's pages; both pools plain or both of formats whose codes are int8 numbers, or halves
            of them, times one scale for each slot or page.

    Raises:
        TypeError: pages that are implicit arrays of another class.
        ValueError: a format that int8 weights with one scale for each slot cannot say exactly, or keys that
            are plain beside values that are not.
    """
    from jax.experimental.pallas.ops.tpu.paged_attention.quantization_utils import MAX_INT8, QuantizedTensor

    parts = [_scaled(name, pool, (jnp.int8,)) for name, pool in _pools(view)]
    if len({scales is None for _, scales in parts}) > 1:
        kept = ["plain" if scales is None else "quantized" for _, scales in parts]
        raise ValueError(
            f"view must hold keys and values that are both plain or both quantized, since the kernel takes "
            f"scales for both or for neither, but its keys are {kept[0]} and its values {kept[1]}; give both "
            f"the same kind of format, or take qpaged.paged_attention."
        )
    keys, values = (
        pages if scales is None else QuantizedTensor(pages, scales[..., None] * jnp.float32(MAX_INT8))
        for pages, scales in parts
    )
    return keys, values


def scaled_pages(view: PagedAttentionCacheView) -> ScaledPages:
    """Keys and values as ``gpu.paged_attention`` takes them: numbers, and what each slot's are multiplied by.

    Exact: a number times its scale is the view's value in float32, bit for bit. Codes of 8 bits
    (``int8:token``, and ``fp8_e4m3`` and ``fp8_e5m2`` by page or token) stay where they lie; codes of fewer
    bits come one a byte, as a copy. Plain pages (``raw``, too) come in the logical dtype, without scales; the
    kernel wants the query in it.

    The kernel multiplies queries with keys and nothing else: scale the query by 1 / sqrt(head_dim).

    Args:
        view: the layer's pages, of formats whose codes are numbers of int8, float8_e4m3fn or float8_e5m2, or
            halves of them, times one scale for each slot or page; keys and values each their own.

    Raises:
        TypeError: pages that are implicit arrays of another class.
        ValueError: a format that such numbers with one scale for each slot cannot say exactly.
    """
    dtypes = (jnp.int8, jnp.float8_e4m3fn, jnp.float8_e5m2)
    (keys, key_scales), (values, value_scales) = (_scaled(name, pool, dtypes) for name, pool in _pools(view))
    return ScaledPages(keys, values, key_scales, value_scales)


def interleaved_pages(view: PagedAttentionCacheView) -> jax.Array:
    """Keys and values as ``tpu.ragged_paged_attention`` takes them: its ``kv_pages``.

    Every format, decoded: the view's values in its logical dtype, (pages, page_size, 2 · kv_heads, head_dim),
    with the keys of head h at 2h and its values at 2h + 1. A copy of the pool, in plain floats. The kernel's
    own quantized pages have one scale for the whole pool, a Python float, which no format here has: leave
    ``k_scale`` and ``v_scale`` None.

    In a bfloat16 cache ``int8`` by page and ``fp8`` lose nothing by this: (c + 1/2) and an fp8 number have at
    most 8 significant bits, and their scales are powers of two.

    Args:
        view: the layer's pages, of any format.
    """
    keys, values = (materialize_nested(pool, full=True) for _, pool in _pools(view))
    heads, pages, page_size, head_dim = keys.shape
    pairs = jnp.stack([keys, values], axis=1).transpose(2, 3, 0, 1, 4)
    return pairs.reshape(pages, page_size, 2 * heads, head_dim)


def decode_sequences(
    view: PagedAttentionCacheView, metadata: PagedAttentionMetadata
) -> tuple[jax.Array, jax.Array]:
    """What a decode attends to, as ``tpu.paged_attention`` and ``gpu.paged_attention`` take it.

    Args:
        view: the layer's pages.
        metadata: of a decode. The slots up to a row's position must lie on pages: these kernels know of no
            holes.

    Returns:
        ``lengths`` (batch,) int32, which are positions + 1, and 0 for an inactive row and for a position past
        its table; and ``page_indices`` (batch, pages_per_sequence) int32 (the GPU kernel's ``block_tables``),
        with 0 for an entry that is not a page, which the kernels would read from, and mask.

    Raises:
        ValueError: the metadata is not a decode's alone.
    """
    tokens = metadata.decodes_tokens()
    if tokens is None or not metadata.is_decode_mode():
        raise ValueError(
            f"metadata must be of a decode alone, since the kernels take one query for each sequence, but is "
            f"{_mode(metadata)}; build it with PagedAttentionMetadata.decode."
        )
    position, table = tokens
    return _lengths(view, position, table), _pages(view, table)


def ragged_sequences(view: PagedAttentionCacheView, metadata: PagedAttentionMetadata) -> RaggedSequences:
    """What a prefill or a decode attends to, as ``tpu.ragged_paged_attention`` takes it.

    The kernel takes a sequence's queries as its last tokens, in order, and at least one slot for each. So an
    inactive row, or one whose position is past its table, has one slot, the first of its table's pages, and
    gives that slot's value, to be ignored, as is what comes out for a prefill's padding.

    Args:
        view: the layer's pages.
        metadata: of a prefill whose positions ascend by one and lie on pages, or of a decode.

    Raises:
        ValueError: the metadata is of both or of neither.
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
        tokens, table = prefill
        position, table = tokens.max(keepdims=True, initial=-1), table[None]
        starts = jnp.stack([jnp.int32(0), (tokens >= 0).sum(dtype=jnp.int32)])
    lengths = jnp.maximum(_lengths(view, position, table), 1)
    return RaggedSequences(lengths, _pages(view, table), starts, jnp.full((1,), len(table), jnp.int32))


def _pools(view: PagedAttentionCacheView) -> tuple[tuple[str, Any], tuple[str, Any]]:
    return ("keys", view.key_pages), ("values", view.value_pages)


def _scaled(part: str, pool: Any, dtypes: tuple[Any, ...]) -> tuple[jax.Array, jax.Array | None]:
    """Numbers of one of the ``dtypes`` and float32 scales (kv_heads, pages, page_size); None where plain."""
    if not isinstance(pool, QuantizedArray):
        if isinstance(pool, ImplicitArray):
            raise TypeError(
                f"view must hold plain arrays or qpaged.QuantizedArray, but its {part} are of type "
                f"{type(pool).__name__}; take interleaved_pages, which materializes them."
            )
        return pool, None
    if pool.scales is None:
        return pool.materialize(), None
    reason = _not_scaled(pool)
    found = _numbers(pool, dtypes) if reason is None else None
    if found is None:
        names = " or ".join(jnp.dtype(dtype).name for dtype in dtypes)
        values = reason or _span(pool)
        raise ValueError(
            f"view must hold pages whose values are {names} numbers times one scale for each slot, but its "
            f"{part} are {pool.quantizer}, which {values}; take interleaved_pages, which decodes them, or "
            f"qpaged.paged_attention, which takes every format."
        )
    numbers, parts = found
    scales = pool.multipliers()[..., 0] / parts
    return numbers, jnp.broadcast_to(scales, pool.shape[:3])


def _not_scaled(pool: QuantizedArray) -> str | None:
    """Why the pool's values are not its codes' times one scale for each slot; None if they are."""
    if pool.quantizer.transforms:
        return "holds transformed channels"
    if jax.eval_shape(pool.shift) is not None:
        return "adds an offset to each block"
    if pool.scales.shape[3] > 1:
        return f"has {pool.scales.shape[3]} scales along the channels"
    return None


def _numbers(pool: QuantizedArray, dtypes: tuple[Any, ...]) -> tuple[jax.Array, float] | None:
    """The pool's codes as numbers of the first of the ``dtypes`` that has them all, and how many of these
    make one unit of the scale: 1, or 2 for codes that stand for halves. None if there is no such dtype."""
    codes, values = _every_code(pool)
    for dtype in dtypes:
        if np.array_equal(codes.view(dtype).astype(np.float32), values, equal_nan=True):
            return lax.bitcast_convert_type(pool.unpacked(), dtype), 1.0
    for dtype in dtypes:
        for parts in (1.0, 2.0):
            if _has(dtype, values * parts):
                return (pool.values(jnp.float32) * parts).astype(dtype), parts
    return None


def _every_code(pool: QuantizedArray) -> tuple[np.ndarray, np.ndarray]:
    """The codes that any byte holds, and the float32 values that they stand for, in units of the scale."""
    with jax.ensure_compile_time_eval():
        every = np.arange(256, dtype=np.uint8).view(pool.codes.dtype).reshape(1, 1, 1, -1)
        held = pool.like(jnp.asarray(every), pool.scales)
        return np.asarray(held.unpacked()), np.asarray(held.values(jnp.float32))


def _has(dtype: Any, values: np.ndarray) -> bool:
    """Whether ``dtype`` has all of these numbers."""
    largest = np.float32(jnp.iinfo(dtype).max if jnp.issubdtype(dtype, jnp.integer) else jnp.finfo(dtype).max)
    if not (np.abs(values) <= largest).all():
        return False
    return np.array_equal(values.astype(dtype).astype(np.float32), values)


def _span(pool: QuantizedArray) -> str:
    """What codes stand for, as the reason of an error."""
    sizes = np.abs(_every_code(pool)[1])
    sizes = sizes[np.isfinite(sizes) & (sizes > 0)]
    return f"reads its codes as numbers of magnitude {sizes.min():g} to {sizes.max():g}"


def _lengths(view: PagedAttentionCacheView, position: jax.Array, table: jax.Array) -> jax.Array:
    """Slots up to each position, that one included; 0 where it has no place."""
    held = (position >= 0) & (position // view.metadata.page_size < table.shape[-1])
    return jnp.where(held, position, -1) + 1


def _pages(view: PagedAttentionCacheView, table: jax.Array) -> jax.Array:
    """The table, with 0 where an entry is not a page."""
    return jnp.where((table >= 0) & (table < view.metadata.num_pages_per_layer), table, 0)


def _mode(metadata: PagedAttentionMetadata) -> str:
    if metadata.is_prefill_mode():
        return "of neither" if metadata.is_decode_mode() else "of a prefill"
    return "of a decode" if metadata.is_decode_mode() else "of a prefill and a decode"
