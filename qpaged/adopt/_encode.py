"""Quantize the arrays of a cache: which quantizer an array gets, and how large its blocks are."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, Sharding

from qpaged._compat import explicit_sharding
from qpaged._promotion import promoting_ranks
from qpaged.adopt._cache_leaf import CacheLeaf, FoundCache
from qpaged.arrays import QuantizedArray, empty, quantize
from qpaged.arrays._blocks import block_max
from qpaged.arrays._explicit import placed_as
from qpaged.arrays._placement import sharding_of_part
from qpaged.formats import CacheFormat, ExactFormat, Quantizer, Wrapper

PlainArray: TypeAlias = jax.Array | np.ndarray | jax.ShapeDtypeStruct


def check_layers(quantizer: CacheFormat, found: FoundCache) -> None:
    """Raise ValueError if a layer is given a format of its own that the cache does not have."""
    layers = {leaf.layer for leaf in found.leaves}
    if None in layers:  # an array of several layers does not say how many
        return
    unknown = [index for index, _ in quantizer.layers if index not in layers]
    if unknown:
        raise ValueError(
            f"quantizer must name layers of the cache's {len(layers)}, counted from 0, but names {unknown}."
        )


def check_zeros(quantizer: CacheFormat, found: FoundCache) -> None:
    """Raise ValueError where the program relies on zeros in unwritten slots, where a format has none."""
    for leaf in found.leaves:
        chosen = quantizer_for(leaf, quantizer)
        if leaf.zero_test is None or chosen is None or _unwritten_reads_as_zero(chosen):
            continue
        bare = chosen
        while isinstance(bare, Wrapper):
            bare = bare.inner
        advice = f"{bare.name}:token" if "token" in bare.granularities else "int8:token"
        raise ValueError(
            f"quantizer must keep slots at zero to which nothing was written, since the step relies on it "
            f"({leaf.path}, {leaf.zero_test}), but {chosen} does not in a page that is in use; "
            f"take a format whose scales are of a token, as {advice}."
        )


def _unwritten_reads_as_zero(quantizer: Quantizer) -> bool:
    """Return True if slots that were not written read as zeros, beside others of their block that were."""
    if quantizer.granularity not in ("page", "channel"):
        return True  # their own scale is 0
    if quantizer.offset is not None:
        return False
    with jax.ensure_compile_time_eval():
        code = jnp.zeros((1,), quantizer.code_dtype(jnp.float32))
        return not np.any(quantizer.decode(code, jnp.float32))


def quantizer_for(leaf: CacheLeaf, quantizer: CacheFormat) -> Quantizer | None:
    """Return the quantizer of one array of the cache; None if the array stays plain.

    Raises:
        ValueError: keys, values or layers that share the array have different quantizers.
    """
    key, value = _key_and_value_quantizers(leaf, quantizer)
    if leaf.role == "key and value" and key != value:
        raise _must_be_the_same("keys and values", leaf, quantizer)
    return value if leaf.role == "value" else key


def _key_and_value_quantizers(
    leaf: CacheLeaf, quantizer: CacheFormat
) -> tuple[Quantizer | None, Quantizer | None]:
    """Return the quantizers of keys and of values in the layer or layers that an array holds."""
    if leaf.layer is not None:
        key, value = quantizer.layer(leaf.layer)
    else:
        key, value = common = (quantizer.key, quantizer.value)
        if any(pair != common for _, pair in quantizer.layers):
            raise _must_be_the_same("layers", leaf, quantizer)
    if isinstance(key, ExactFormat) or isinstance(value, ExactFormat):
        raise ValueError(
            f"quantizer must have no exact pages for the arrays of a model's own cache, which have none, but "
            f"came as {quantizer}; leave out +exact and +sink, or keep the cache in qpaged's pages."
        )
    if any(part is not None and part.has_static_scales for part in (key, value)):
        raise ValueError(
            f"quantizer must fit its scales to the arrays of a model's own cache, which is given none, but "
            f"came as {quantizer}, whose scales are static; take another granularity, as fp8_e4m3:token, or "
            f"keep the cache in qpaged's pages."
        )
    return key, value


def _must_be_the_same(kind: str, leaf: CacheLeaf, quantizer: CacheFormat) -> ValueError:
    return ValueError(
        f"quantizer must be the same for all {kind} that one array holds, as {leaf.path} does, "
        f"but came as {quantizer}."
    )


def quantize_leaf(leaf: CacheLeaf, array: PlainArray, quantizer: Quantizer, page_size: int) -> QuantizedArray:
    """Return an array of the cache, quantized; blocks of zeros count as unwritten.

    Args:
        leaf: the description of the array.
        array: its values, or shape and dtype of an array to make unwritten.
        quantizer: its quantizer.
        page_size: tokens of a block along the length, at most.

    Raises:
        TypeError: it is no array.
        ValueError: it has other axes than the array of the example.
    """
    _check_array(leaf, array)
    block = _block(leaf, array.shape, quantizer, page_size)
    channel_axis = leaf.axis("head_dim") - len(array.shape)  # counted from the end
    if isinstance(array, jax.ShapeDtypeStruct):
        make = functools.partial(empty, array.shape, quantizer, block, array.dtype, channel_axis)
        return _made_at(array.sharding, make)
    quantize_array = functools.partial(
        _quantize_written, quantizer=quantizer, block=block, channel_axis=channel_axis
    )
    sharding = explicit_sharding(array)
    if sharding is None:
        return quantize_array(array)
    struct = jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)
    return placed_as(quantize_array, [array], struct)


def _made_at(sharding: Sharding | None, make: Callable[[], QuantizedArray]) -> QuantizedArray:
    """Return the array that ``make`` makes, each device making its own part of it."""
    if not isinstance(sharding, NamedSharding):
        return make()
    shardings = jax.tree_util.tree_map(
        lambda part: sharding_of_part(sharding, part.shape), jax.eval_shape(make)
    )
    return jax.jit(make, out_shardings=shardings)()


def _check_array(leaf: CacheLeaf, array: PlainArray) -> None:
    if not isinstance(array, PlainArray):
        raise TypeError(
            f"{leaf.path} must be an array or a jax.ShapeDtypeStruct, but came as {type(array).__name__}."
        )
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(f"{leaf.path} must be of floats, but came as {jnp.dtype(array.dtype).name}.")
    if len(array.shape) != len(leaf.axes) or array.shape[leaf.axis("length")] == 0:
        raise ValueError(
            f"{leaf.path} must have the axes {leaf.axes}, with room for a token, "
            f"but came with shape {array.shape}."
        )


def _block(leaf: CacheLeaf, shape: tuple[int, ...], quantizer: Quantizer, page_size: int) -> tuple[int, ...]:
    """Return the shape of the blocks that share a scale, in the axes of the array."""
    length_axis = leaf.axis("length")
    channel_axis = leaf.axis("head_dim")
    page = _largest_divisor(shape[length_axis], page_size)  # blocks of a QuantizedArray are all of one size
    block = [1] * len(shape)
    block[length_axis], block[channel_axis] = quantizer.block((page, shape[channel_axis]))
    return tuple(block)


def _largest_divisor(number: int, limit: int) -> int:
    """Return the largest divisor of a number that is at most ``limit``."""
    for divisor in range(min(number, limit), 1, -1):
        if number % divisor == 0:
            return divisor
    return 1


@promoting_ranks
@functools.partial(jax.jit, static_argnames=("quantizer", "block", "channel_axis"))
def _quantize_written(
    array: jax.Array | np.ndarray, quantizer: Quantizer, block: tuple[int, ...], channel_axis: int
) -> QuantizedArray:
    """Return an array quantized, with scale 0 for blocks of zeros.

    A block into which nothing was written yet has scale 0, and reads as exact zeros. With any other scale it
    would not: codes of formats such as `int8` stand for odd multiples of half the scale.
    """
    quantized = quantize(array, quantizer, block, array.dtype, channel_axis)
    if quantized.scales is None:
        return quantized
    is_written = block_max(jnp.abs(array), quantized.scales.shape) > 0
    scales = jnp.where(is_written, quantized.scales, 0).astype(quantized.scales.dtype)
    return quantized.like(quantized.codes, quantized.parts._replace(scales=scales))
