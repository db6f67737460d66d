"""Views of pools that engines for TPUs have allocated themselves."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from qpaged._arguments import as_array
from qpaged.cache import PagedAttentionCacheMetaData, PagedAttentionCacheView
from qpaged.cache._config import check_metadata, logical_dtype
from qpaged.cache._view_checks import checked_layer
from qpaged.pools import InterleavedPages, ValuesInKeys

WORD_BYTES = 4  # heads of a slot go to words of 32 bits
LANES = 128
STORED = "bfloat16", "float32", "float16", "float8_e4m3fn", "float8_e5m2", "int8"


def interleaved_shape(
    metadata: PagedAttentionCacheMetaData, dtype: DTypeLike
) -> tuple[int, int, int, int, int]:
    """Return the shape of a layer's pool in vLLM's and SGLang's engines for TPUs.

    Args:
        metadata: the sizes of the cache.
        dtype: that the engine stores: bfloat16, float16, float32, float8_e4m3fn, float8_e5m2 or int8.

    Returns:
        (pages, page_size, ceil(2 * kv_heads / packing), packing, head_dim), where ``packing`` elements fill
        32 bits, and head_dim is filled up to a multiple of 128.

    Raises:
        ValueError: another dtype.
    """
    stored = jnp.dtype(dtype)
    if stored.name not in STORED:
        raise ValueError(f"dtype must be one of {', '.join(STORED)}, but came as {stored.name}.")
    packing = WORD_BYTES // stored.itemsize
    kv_heads, pages, page_size, head_dim = metadata.pool_shape
    return pages, page_size, -(-2 * kv_heads // packing), packing, -(-head_dim // LANES) * LANES


def interleaved_view(
    pages: ArrayLike,
    metadata: PagedAttentionCacheMetaData,
    *,
    dtype: DTypeLike = jnp.bfloat16,
    k_scale: ArrayLike | None = None,
    v_scale: ArrayLike | None = None,
    layer_index: int = 0,
) -> PagedAttentionCacheView:
    """Return a view of a layer's pool as tpu-inference (vLLM on TPUs) and sglang-jax keep it, without a copy.

    It is written, read, copied and taken like any other, and ``view.key_pages.pages`` is the engine's array
    again. Donate the view to change that in place. Rows are rounded to the nearest number of its dtype, and
    saturate where there are scales. Attention runs on ``xla`` and ``reference``.

    Args:
        pages: (pages, page_size, ceil(2 * kv_heads / packing), packing, head_dim), as
            :func:`interleaved_shape` says; keys of head h at 2 h, and values at 2 h + 1.
        metadata: the sizes of the cache.
        dtype: the logical dtype of keys and values.
        k_scale: what a stored key is multiplied with, a positive number; needed for pools of 8 bits.
        v_scale: likewise for values.
        layer_index: the layer, counted from 0.

    Raises:
        TypeError: metadata of another kind.
        ValueError: another shape or dtype, or scales for one side alone, for pools of 16 or 32 bits, or none
            for pools of 8.
    """
    check_metadata(metadata, "give the sizes of the engine's cache")
    layer_index = checked_layer(layer_index, metadata.num_hidden_layers)
    config = metadata.of_layer(layer_index)
    if config.values_in_keys or config.value_dim != config.kv_head_dim_size:
        raise ValueError(
            "metadata must be of values of the keys' head size, each beside its key, but has "
            f"{config.value_dim} channels of values for {config.kv_head_dim_size} of keys."
        )
    array = as_array("pages", pages)
    shape = interleaved_shape(config, array.dtype)
    if array.shape != shape:
        raise ValueError(
            f"pages must have shape {shape} for {config.num_kv_heads} KV heads of {config.kv_head_dim_size} "
            f"in {array.dtype.name}, but came with {array.shape}; see interleaved_shape."
        )
    is_scaled = array.dtype.itemsize == 1
    given = [scale is not None for scale in (k_scale, v_scale)]
    if given != [is_scaled, is_scaled]:
        rule = "both be given for pools of 8 bits" if is_scaled else "be left out for pools of floats"
        raise ValueError(
            f"k_scale and v_scale must {rule}, but came as {k_scale} and {v_scale} for {array.dtype.name}; "
            f"give 1.0 for what is stored unscaled."
        )
    scales = _checked_scales(k_scale, v_scale) if is_scaled else None
    logical = logical_dtype(dtype)
    keys = InterleavedPages(array, scales, config.num_kv_heads, config.kv_head_dim_size, logical)
    return PagedAttentionCacheView(config, layer_index, keys, ValuesInKeys(config.value_pool_shape, logical))


def _checked_scales(k_scale: ArrayLike | None, v_scale: ArrayLike | None) -> jax.Array:
    """Return (2,) float32 scales, or raise unless they are positive numbers."""
    scales = jnp.stack([jnp.float32(as_array("k_scale", k_scale)), jnp.float32(as_array("v_scale", v_scale))])
    if scales.shape != (2,):
        raise ValueError(
            f"k_scale and v_scale must be one number each, but came with shape {scales.shape[1:]}."
        )
    if not isinstance(scales, jax.core.Tracer) and not bool(((scales > 0) & jnp.isfinite(scales)).all()):
        raise ValueError(f"k_scale and v_scale must be positive and finite, but came as {scales.tolist()}.")
    return scales
