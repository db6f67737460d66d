"""Quantize the arrays of a cache: which quantizer an array gets, and how large its blocks are."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, Sharding
from jax.typing import DTypeLike

from qpaged._compat import explicit_sharding
from qpaged.adopt._cache_leaf import CacheLeaf, FoundCache
from qpaged.arrays import PartlyExact, empty, overwrite_exact
from qpaged.arrays._exact_places import Places
from qpaged.arrays._explicit import placed_as
from qpaged.arrays._partly_exact import empty_with_exact_pages, quantize_written
from qpaged.arrays._placement import sharding_of_part
from qpaged.arrays._rows import CacheArray
from qpaged.formats import (
    CacheFormat,
    ExactFormat,
    PoolQuantizer,
    Quantizer,
    Wrapper,
    format_of_codes,
    get_quantizer,
)

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
        if leaf.zero_test is None or chosen is None:
            continue
        codes = format_of_codes(chosen)
        if _unwritten_reads_as_zero(codes):
            continue
        bare = codes
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


def has_format(array: CacheArray, quantizer: PoolQuantizer) -> bool:
    """Return True if an array was quantized with a quantizer."""
    is_exact = isinstance(array, PartlyExact)
    return array.quantizer == format_of_codes(quantizer) and is_exact == isinstance(quantizer, ExactFormat)


def has_whole_pages(array: CacheArray) -> bool:
    """Return True unless an array with exact pages was cut in the middle of one."""
    return not isinstance(array, PartlyExact) or array.places.length % array.places.page_size == 0


def quantizer_for(leaf: CacheLeaf, quantizer: CacheFormat) -> PoolQuantizer | None:
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
) -> tuple[PoolQuantizer | None, PoolQuantizer | None]:
    """Return the quantizers of keys and of values in the layer or layers that an array holds."""
    if leaf.layer is not None:
        key, value = quantizer.layer(leaf.layer)
    else:
        key, value = common = (quantizer.key, quantizer.value)
        if any(pair != common for _, pair in quantizer.layers):
            raise _must_be_the_same("layers", leaf, quantizer)
    if any(part is not None and format_of_codes(part).has_static_scales for part in (key, value)):
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


def quantize_leaf(leaf: CacheLeaf, array: PlainArray, quantizer: PoolQuantizer, page_size: int) -> CacheArray:
    """Return an array of the cache, quantized; blocks of zeros count as unwritten.

    Args:
        leaf: the description of the array.
        array: its values, or shape and dtype of an array to make unwritten.
        quantizer: its quantizer; with exact pages, the newest that hold anything but zeros are.
        page_size: tokens of a page along the length, at most.

    Raises:
        TypeError: it is no array.
        ValueError: it has other axes than the array of the example.
    """
    _check_array(leaf, array)
    recipe = Recipe(leaf.axis("length"), leaf.axis("head_dim") - len(leaf.axes), quantizer, page_size)
    if isinstance(array, jax.ShapeDtypeStruct):
        return _made_at(array.sharding, lambda: _empty(recipe, array.shape, array.dtype))
    sharding = explicit_sharding(array)
    if sharding is None:
        return _filled(array, recipe)
    struct = jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)
    filled: CacheArray = placed_as(lambda array: _filled(array, recipe), [array], struct)
    return filled


class Recipe(NamedTuple):
    """How an array of a cache is quantized.

    Attributes:
        length_axis: the axis of the tokens, from the start.
        channel_axis: the axis of the channels, counted from the end.
        quantizer: the format.
        page_size: tokens of a page, at most.
    """

    length_axis: int
    channel_axis: int
    quantizer: PoolQuantizer
    page_size: int


def _empty(recipe: Recipe, shape: tuple[int, ...], dtype: DTypeLike) -> CacheArray:
    """Return an array of the cache in which nothing was written yet."""
    length_axis, channel_axis, quantizer, most = recipe
    page = _largest_divisor(shape[length_axis], most)  # blocks of a QuantizedArray are all of one size
    codes = format_of_codes(quantizer)
    block = [1] * len(shape)
    block[length_axis], block[channel_axis] = codes.block((page, shape[channel_axis]))
    if not isinstance(quantizer, ExactFormat):
        return empty(shape, codes, block, dtype, channel_axis)
    places = Places.of(shape[length_axis], page, quantizer.window(page), quantizer.sink_pages(page))
    raw = get_quantizer("raw")
    return empty_with_exact_pages(shape, codes, raw, block, dtype, channel_axis, length_axis, places)


@functools.partial(jax.jit, static_argnames="recipe")
def _filled(array: jax.Array | np.ndarray, recipe: Recipe) -> CacheArray:
    """Return an array of the cache, quantized."""
    array = jnp.asarray(array)
    made = _empty(recipe, array.shape, array.dtype)
    if isinstance(made, PartlyExact):
        return overwrite_exact(made, array)
    return quantize_written(array, made.quantizer, made.block, recipe.channel_axis)


def _made_at(sharding: Sharding | None, make: Callable[[], CacheArray]) -> CacheArray:
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


def _largest_divisor(number: int, limit: int) -> int:
    """Return the largest divisor of a number that is at most ``limit``."""
    for divisor in range(min(number, limit), 1, -1):
        if number % divisor == 0:
            return divisor
    return 1
