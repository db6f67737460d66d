"""Quantized arrays made whole: from floats, from zeros, and from parts that were read from a file."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from qpaged._promotion import promoting_ranks
from qpaged.arrays._blocks import check_block, scale_shape
from qpaged.arrays._dtypes import dtype_of_floats, float_dtype
from qpaged.arrays._encoding import encode, fit_blocks, to_block_values
from qpaged.arrays._explicit import placed_as
from qpaged.arrays._lane_rows import count_slots_per_row
from qpaged.arrays._packing import BYTE, codes_together, has_planes, pack
from qpaged.arrays._protocol import ArrayFormat
from qpaged.arrays._quantized import QuantizedArray, logical_shape


@promoting_ranks
def quantize(
    array: ArrayLike,
    quantizer: ArrayFormat,
    block: Sequence[int],
    dtype: DTypeLike | None = None,
    channel_axis: int = -1,
) -> QuantizedArray:
    """Return the whole of ``array`` in ``quantizer``'s format, with one scale for every ``block``.

    Args:
        array: floats of any shape.
        quantizer: the format.
        block: extents of a block along each axis; they divide the shape.
        dtype: the logical dtype; the array's own if None.
        channel_axis: the axis of the channels (head_dim), counted from the end.

    Raises:
        TypeError: the array is not of a real floating-point dtype.
        ValueError: the block does not divide the shape, or whole bytes of codes do not.
    """
    array = jnp.asarray(array)
    dtype = dtype_of_floats("array", array.dtype) if dtype is None else float_dtype("dtype", dtype)
    check_block(array.shape, block)
    _check_packing(array.shape, quantizer, channel_axis)
    if quantizer.scale_dtype is None:
        codes = quantizer.encode(array.astype(dtype))
        return QuantizedArray(stored=codes, scales=None, quantizer=quantizer, dtype=dtype)
    x = to_block_values(array, quantizer, dtype, channel_axis)
    grid = scale_shape(array.shape, block)
    scales, global_scale = fit_blocks(quantizer, x, grid, channel_axis)
    codes = encode(x, quantizer, scales, global_scale, channel_axis=channel_axis)
    channels_matter = quantizer.bits < BYTE or quantizer.transform is not None
    return QuantizedArray(
        stored=pack(codes, quantizer.bits, channel_axis),
        scales=scales,
        global_scale=global_scale,
        quantizer=quantizer,
        channel_axis=channel_axis if channels_matter else -1,
        dtype=dtype,
    )


def empty(
    shape: Sequence[int],
    quantizer: ArrayFormat,
    block: Sequence[int],
    dtype: DTypeLike,
    channel_axis: int = -1,
) -> QuantizedArray:
    """Return an array in which nothing was written yet: all its parts are zeros, and so are its values."""
    # Of shapes alone, since a quantizer need not encode zeros as code 0.
    parts = jax.eval_shape(lambda: quantize(jnp.zeros(shape, dtype), quantizer, block, dtype, channel_axis))
    array = jax.tree_util.tree_map(lambda part: jnp.zeros(part.shape, part.dtype), parts)
    if quantizer.has_static_scales:
        array.scales = quantizer.fit(*[jnp.zeros(array.scales.shape, jnp.float32)] * 2)
    return array


def quantize_under(array: QuantizedArray, new: ArrayLike) -> QuantizedArray:
    """Return floats quantized under the static scales of ``array``, with as many blocks along each axis."""
    x = to_block_values(jnp.asarray(new), array.quantizer, array.dtype, array.channel_axis)
    codes = encode(x, array.quantizer, array.block_scales, channel_axis=array.channel_axis)
    return array.like(pack(codes, array.quantizer.bits, array.channel_axis), array.parts)


def overwrite(array: QuantizedArray, new: Any) -> QuantizedArray:
    """Return ``array`` with every element replaced by ``new``: fresh scales but static ones, same blocks."""
    sharding = array.explicit_sharding()
    if sharding is None:
        return _overwrite(array, new)
    struct = jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)
    return placed_as(_overwrite, [array, new], struct)


def _overwrite(array: QuantizedArray, new: Any) -> QuantizedArray:
    if array.quantizer.has_static_scales:
        values = new.dequantize() if isinstance(new, QuantizedArray) else new
        return quantize_under(array, lax.stop_gradient(values))
    if not isinstance(new, QuantizedArray):
        new = quantize(lax.stop_gradient(new), array.quantizer, array.block, array.dtype, array.channel_axis)
    elif (new.quantizer, new.block, new.channel_axis) != (array.quantizer, array.block, array.channel_axis):
        return _overwrite(array, new.dequantize())
    return array.like(new.codes, new.parts)


def fill_lane_rows(array: QuantizedArray) -> QuantizedArray:
    """Return ``array`` (..., slots, channels) stored with as many slots to a row as fill a TPU's lanes."""
    slots_per_row = 1
    if array.channel_axis == -1:
        slots_per_row = count_slots_per_row(array.codes.shape, has_planes(array.quantizer.bits))
    return array.like(array.codes, array.parts, slots_per_row=slots_per_row)


def _check_packing(shape: Sequence[int], quantizer: ArrayFormat, channel_axis: int) -> None:
    """Raise ValueError unless codes along the channel axis fill whole bytes."""
    together = codes_together(quantizer.bits)
    if together > 1 and shape[channel_axis] % together:
        raise ValueError(
            f"array must have a multiple of {together} channels, for codes of {quantizer} to fill whole "
            f"bytes, but came with shape {tuple(shape)}; take a format of 8 bits."
        )


def check_parts(
    codes: jax.Array,
    scales: jax.Array | None,
    global_scale: jax.Array | None,
    quantizer: ArrayFormat,
    dtype: DTypeLike,
) -> None:
    """Raise ValueError unless these are the parts of one array of this format, channels last."""
    global_dtype = None if quantizer.global_scale is None else quantizer.global_scale.dtype
    fits = _codes_fit(codes, quantizer, dtype)
    if fits:
        shape = logical_shape(codes.shape, quantizer.bits, -1)
        fits = _part_fits(scales, quantizer.scale_dtype, shape) and _part_fits(
            global_scale, global_dtype, shape
        )
    if not fits:
        came = [
            None if part is None else f"{part.dtype.name}{part.shape}"
            for part in (codes, scales, global_scale)
        ]
        raise ValueError(
            f"codes, scales and global scale must be of one {quantizer} array, but came as {came}; "
            f"the data was not written whole."
        )


def _codes_fit(codes: jax.Array, quantizer: ArrayFormat, dtype: DTypeLike) -> bool:
    code_dtype = jnp.uint8 if quantizer.bits < BYTE else quantizer.code_dtype(dtype)
    return codes.ndim > 0 and codes.dtype == code_dtype


def _part_fits(part: jax.Array | None, dtype: DTypeLike | None, shape: Sequence[int]) -> bool:
    """Return True if ``part`` has the dtype and divides ``shape`` into blocks, or if both are None."""
    if part is None or dtype is None:
        return part is None and dtype is None
    if part.ndim != len(shape) or part.dtype != dtype:
        return False
    return all(count > 0 and length % count == 0 for length, count in zip(shape, part.shape, strict=True))
