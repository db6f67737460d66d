"""Pages in the forms that JAX's kernels take."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from qpaged.arrays import QuantizedArray
from qpaged.cache import PagedAttentionCacheView
from qpaged.formats import ExactFormat
from qpaged.implicit import materialize_nested
from qpaged.interop._numbers import as_numbers, magnitudes
from qpaged.pools import Pages, Pool, as_quantized, format_of, gather_slots, static_scales

if TYPE_CHECKING:
    from jax.experimental.pallas.ops.tpu.paged_attention.quantization_utils import QuantizedTensor

FLOAT8 = jnp.float8_e4m3fn, jnp.float8_e5m2


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


class ScaledInterleavedPages(NamedTuple):
    """Pages and scales, named as ``tpu.ragged_paged_attention`` names its arguments.

    Attributes:
        kv_pages: (pages, page_size, 2 * kv_heads, head_dim) in float8_e4m3fn or float8_e5m2; the keys of head
            h are at 2h, its values at 2h + 1.
        k_scale: the factor of all keys.
        v_scale: the factor of all values.
    """

    kv_pages: jax.Array
    k_scale: float
    v_scale: float


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
            or halves of int8 numbers, times one scale for each slot, or for more.

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
    (``int8:token``, and ``fp8_e4m3`` and ``fp8_e5m2`` by page, token, head or tensor) are returned without a
    copy; codes of fewer bits are copied, one to a byte. Plain pages, ``raw`` among them, are returned in the
    logical dtype, without scales; the kernel wants the query in the same dtype.

    The kernel does not scale its scores: multiply the query by 1 / sqrt(head_dim) first.

    Args:
        view: the layer's pages. Keys and values are each plain or of a format whose values are int8,
            float8_e4m3fn or float8_e5m2 numbers, or halves of them, times one scale for each slot or more.

    Raises:
        TypeError: the pages are implicit arrays of another class.
        ValueError: such numbers times one scale for each slot cannot represent the format exactly.
    """
    dtypes = (jnp.int8, *FLOAT8)
    keys, key_scales = _scaled_codes("keys", view.key_pages, dtypes)
    values, value_scales = _scaled_codes("values", view.value_pages, dtypes)
    return ScaledPages(keys, values, key_scales, value_scales)


def interleaved_pages(view: PagedAttentionCacheView) -> jax.Array:
    """Return keys and values as ``tpu.ragged_paged_attention`` takes them: its ``kv_pages``.

    The pages of any format are decoded to the view's logical dtype, (pages, page_size, 2 · kv_heads,
    head_dim), with the keys of head h at 2h and its values at 2h + 1. This copies the pool. Leave the
    kernel's ``k_scale`` and ``v_scale`` None: its own quantized pages have one scale for the whole pool, as
    :func:`scaled_interleaved_pages` takes them.

    In a bfloat16 cache ``int8`` by page and ``fp8`` lose nothing: (c + 1/2) and an fp8 number have at most 8
    significant bits, and their scales are powers of two.

    Args:
        view: the layer's pages, of any format.
    """
    shape = view.metadata.pool_shape
    return _interleaved(_decoded(view.key_pages, shape), _decoded(view.value_pages, shape))


def scaled_interleaved_pages(view: PagedAttentionCacheView) -> ScaledInterleavedPages:
    """Return keys and values as ``tpu.ragged_paged_attention`` takes them with scales.

    For formats with one static scale for all keys, and one for all values, as ``fp8_e4m3:tensor``. Exact: a
    number times its scale is the view's value in float32, bit for bit. Interleaving copies the pool, at a
    byte an element.

    The kernel's scales are Python numbers that it is compiled for: call this outside of ``jit``.

    Args:
        view: the layer's pages. Both pools have static scales and numbers of one dtype, float8_e4m3fn or
            float8_e5m2.

    Raises:
        TypeError: the scales are traced.
        ValueError: another format, a scale for each KV head, or keys and values of different dtypes.
    """
    keys, k_scale = _statically_scaled("keys", view.key_pages)
    values, v_scale = _statically_scaled("values", view.value_pages)
    if keys.dtype != values.dtype:
        raise ValueError(
            f"view must hold keys and values of one dtype, since the kernel takes both in one array, but its "
            f"keys are {keys.dtype.name} and its values {values.dtype.name}; take interleaved_pages, which "
            f"decodes them."
        )
    return ScaledInterleavedPages(_interleaved(keys, values), k_scale, v_scale)


def _statically_scaled(part: str, pool: Pages) -> tuple[jax.Array, float]:
    """Return the numbers of a pool in an 8-bit float, and their one scale."""
    scales = static_scales(pool)
    if isinstance(scales, jax.core.Tracer):
        raise TypeError(
            f"view must hold scales that are known, since the kernel takes them as Python numbers, but those "
            f"of its {part} are traced; call scaled_interleaved_pages outside of jit."
        )
    reason = _reason_not_one_scale(pool)
    if reason is None:
        quantized = as_quantized(pool)
        assert quantized is not None  # since it has static scales
        numbers = as_numbers(quantized, FLOAT8)
        if numbers is not None:
            return numbers.array, float(quantized.multipliers().reshape(())) / numbers.per_unit
        reason = magnitudes(quantized)
    raise ValueError(
        f"view must hold pages whose values are 8-bit floats times one static scale, as fp8_e4m3:tensor, but "
        f"its {part} are {format_of(pool) or 'plain'}, which {reason}; take interleaved_pages, which decodes "
        f"them, or qpaged.paged_attention, which takes every format."
    )


def _reason_not_one_scale(pool: Pages) -> str | None:
    """Return why a pool's values are not decoded codes times one static scale, or None."""
    quantized, scales = as_quantized(pool), static_scales(pool)
    if isinstance(format_of(pool), ExactFormat):
        return "has exact pages beside its codes"
    if quantized is None or scales is None:
        return "has no static scales"
    if len(scales) > 1:
        return f"has {len(scales)} scales, one for each KV head"
    return _reason_not_scaled(quantized)


def _interleaved(keys: jax.Array, values: jax.Array) -> jax.Array:
    """Return keys and values as (pages, page_size, 2 * kv_heads, head_dim), in turns along the heads."""
    heads, pages, page_size, head_dim = keys.shape
    pairs = jnp.stack([keys, values], axis=1).transpose(2, 3, 0, 1, 4)
    return pairs.reshape(pages, page_size, 2 * heads, head_dim)


def _decoded(pool: Pages, shape: tuple[int, ...]) -> jax.Array:
    """Return the pages of any kind of pool as a plain array of ``shape``."""
    if isinstance(pool, Pool):
        slots = materialize_nested(gather_slots(pool, jnp.arange(shape[1])), full=True)
        return slots.reshape(shape)
    return materialize_nested(pool, full=True)


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
        numbers = as_numbers(quantized, dtypes)
        if numbers is not None:
            scales = quantized.multipliers()[..., 0] / numbers.per_unit
            return numbers.array, jnp.broadcast_to(scales, quantized.shape[:3])
        reason = magnitudes(quantized)
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
