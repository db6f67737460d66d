"""Formats of arrays that lazy reads make: the same codes, read in another way than they are stored.

A read such as ``x.astype(jnp.float32)`` or ``2 * x`` keeps the codes and changes what they mean. The array
that it gives back has a :class:`ReadFormat`, and cannot be written to.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

from qpaged.arrays._packing import BYTE, extract_codes
from qpaged.arrays._protocol import ArrayFormat, GlobalScaleRule, OffsetRule, TransformRule
from qpaged.arrays._quantized import BlockParts, QuantizedArray


@dataclass(frozen=True)
class ReadFormat:
    """A format whose codes are read in another way than they are stored; a read-only :class:`ArrayFormat`.

    Attributes:
        source: the format that the codes were written in.
        dtypes: the dtypes that values are cast through in order, from the one that the codes were written
            for; empty if that is the array's own. Codes of bfloat16 that a program casts to float16 and then
            to float32 have (bfloat16, float16) here, and float32 is the array's.
        unpacked: there is one code per element.
        untransformed: values are left in the transformed channels.
        float_scales: scales are float32 factors, and offsets a part of their own, instead of the stored form.
    """

    source: ArrayFormat
    dtypes: tuple[np.dtype, ...] = ()
    unpacked: bool = False
    untransformed: bool = False
    float_scales: bool = False

    @property
    def writable(self) -> bool:
        return False

    @property
    def has_static_scales(self) -> bool:
        return False  # nothing is written under the scales of a read

    @property
    def growth(self) -> None:
        return None

    @property
    def block_fit(self) -> None:
        return None

    @property
    def bits(self) -> int:
        return BYTE if self.unpacked else self.source.bits

    @property
    def state_bits(self) -> int | None:
        return None if self.unpacked else self.source.state_bits

    @property
    def scale_dtype(self) -> DTypeLike | None:
        return jnp.float32 if self.float_scales else self.source.scale_dtype

    @property
    def nan_scale(self) -> float | int | None:
        return math.nan if self.float_scales else self.source.nan_scale

    @property
    def elementwise(self) -> bool:
        return self.source.elementwise

    @property
    def offset(self) -> OffsetRule | None:
        return None if self.float_scales else self.source.offset

    @property
    def global_scale(self) -> GlobalScaleRule | None:
        return None if self.float_scales else self.source.global_scale

    @property
    def transform(self) -> TransformRule | None:
        return None if self.untransformed else self.source.transform

    def code_dtype(self, dtype: DTypeLike) -> Any:
        return self.source.code_dtype(self.dtypes[0] if self.dtypes else dtype)

    def multiplier(self, scales: jax.Array) -> jax.Array:
        return scales if self.float_scales else self.source.multiplier(scales)

    def decode(self, codes: jax.Array, dtype: DTypeLike) -> jax.Array:
        casts = (*self.dtypes, dtype)
        values = self.source.decode(codes, casts[0])
        for next_dtype in casts[1:]:
            values = values.astype(next_dtype)
        return values

    def fit(self, low: jax.Array, high: jax.Array) -> jax.Array:
        raise TypeError(_read_only_message(self))

    def encode(self, units: jax.Array) -> jax.Array:
        raise TypeError(_read_only_message(self))

    def to_units(self, x: jax.Array, scales: jax.Array) -> jax.Array:
        raise TypeError(_read_only_message(self))

    def encode_under(self, x: jax.Array, scales: jax.Array) -> jax.Array:
        raise TypeError(_read_only_message(self))

    def __str__(self) -> str:
        return str(self.source)


def _read_only_message(quantizer: ReadFormat) -> str:
    return f"arrays that were read from {quantizer.source} pages cannot be written to; write to the pages."


def _as_read_format(quantizer: ArrayFormat) -> ReadFormat:
    return quantizer if isinstance(quantizer, ReadFormat) else ReadFormat(quantizer)


def channels_matter(array: QuantizedArray) -> bool:
    """Return True if the array's format depends on which axis the channels are on."""
    return array.codes_per_byte > 1 or array.quantizer.transform is not None


def unpack_codes(array: QuantizedArray) -> QuantizedArray:
    """Return the array with one code per element, for a format without transform."""
    if array.codes_per_byte == 1:
        return array
    # Such an array does not depend on its channel axis, which is then -1.
    quantizer = replace(_as_read_format(array.quantizer), unpacked=True)
    return array.like(array.unpacked(), array.parts, quantizer=quantizer, channel_axis=-1)


def free_channels(array: QuantizedArray) -> QuantizedArray | None:
    """Return :func:`unpack_codes` of the array, to cut channels apart; None if a transform mixes them."""
    return unpack_codes(array) if array.quantizer.transform is None else None


def split_bytes(array: QuantizedArray) -> list[QuantizedArray] | None:
    """Return an array per byte index, the one of index i with channels i, i + codes_per_byte, and so on.

    None where a byte is one code, codes are read together, or blocks have no multiple of a byte's codes.
    """
    codes_per_byte, axis = array.codes_per_byte, array.channels
    extent = array.block[axis]
    if codes_per_byte == 1 or array.quantizer.state_bits is not None:
        return None
    if extent > 1 and extent % codes_per_byte:
        return None
    quantizer = replace(_as_read_format(array.quantizer), unpacked=True)
    code_dtype = array.quantizer.code_dtype(array.dtype)
    arrays = []
    for byte_index in range(codes_per_byte):
        codes = extract_codes(array.codes, array.quantizer.bits, byte_index, code_dtype, axis)
        parts = array.parts
        if extent == 1:
            parts = _every_nth(parts, byte_index, codes_per_byte, axis)
        arrays.append(array.like(codes, parts, quantizer=quantizer, channel_axis=-1))
    return arrays


def _every_nth(parts: BlockParts, start: int, stride: int, axis: int) -> BlockParts:
    return parts.map(lambda part: lax.slice_in_dim(part, start, None, stride, axis))


def with_float_scales(array: QuantizedArray) -> QuantizedArray:
    """Return ``array`` with float32 factors for scales, the second level included, and its offsets apart."""
    quantizer = _as_read_format(array.quantizer)
    if quantizer.float_scales:
        return array
    parts = BlockParts(array.multipliers(), None, array.block_offset())
    return array.like(array.codes, parts, quantizer=replace(quantizer, float_scales=True))


def multiply_by_scalar(array: QuantizedArray, factor: jax.Array) -> QuantizedArray:
    """Return ``array`` times a scalar: the codes stay, the scales become float32 factors."""
    factor = jnp.asarray(factor).astype(jnp.float32)
    if array.scales is None:
        quantizer = _as_read_format(array.quantizer)
        # The codes decode as the dtype that they had, and only then meet the factor.
        dtypes = (*quantizer.dtypes, jnp.dtype(array.dtype))
        scales = jnp.ones((1,) * array.ndim, jnp.float32) * factor
        quantizer = replace(quantizer, dtypes=dtypes, float_scales=True)
        return array.like(array.codes, BlockParts(scales), quantizer=quantizer)
    view = with_float_scales(array)
    return view.like(view.codes, view.parts.map(lambda part: part * factor))


def convert(array: QuantizedArray, dtype: DTypeLike) -> QuantizedArray:
    """Return the array with another logical floating-point dtype; codes and scales stay."""
    dtype = jnp.dtype(dtype)
    quantizer = array.quantizer
    if array.scales is None or not quantizer.writable:
        # Codes without scales, and codes of an earlier read, decode by the dtype that the array had.
        quantizer = _as_read_format(quantizer)
        quantizer = replace(quantizer, dtypes=(*quantizer.dtypes, jnp.dtype(array.dtype)))
    return array.like(array.codes, array.parts, quantizer=quantizer, dtype=dtype)


def untransformed(array: QuantizedArray) -> QuantizedArray:
    """Return the array with its channels left transformed, as its blocks hold them."""
    if array.quantizer.transform is None:
        return array
    quantizer = replace(_as_read_format(array.quantizer), untransformed=True)
    return array.like(array.codes, array.parts, quantizer=quantizer)


def is_of_floats(array: QuantizedArray) -> bool:
    """Return True if the codes were stored without scales: as any floats, which bfloat16 need not hold."""
    quantizer = array.quantizer
    source = quantizer.source if isinstance(quantizer, ReadFormat) else quantizer
    return source.scale_dtype is None


def nan_code_and_scale(array: QuantizedArray) -> tuple[int, float | int | None] | None:
    """Return a code and a scale that read as NaN; None if no stored scale does.

    The scale is None for a format without scales. With scales the code is 0, since every code decodes to a
    number or NaN, and NaN times either is NaN.
    """
    if array.scales is not None:
        scale = array.quantizer.nan_scale
        return None if scale is None else (0, scale)
    dtype = array.dtype
    if isinstance(array.quantizer, ReadFormat) and array.quantizer.dtypes:
        dtype = array.quantizer.dtypes[0]
    return int(np.full((), np.nan, dtype).view(array.stored.dtype)), None


def transform_adjoint(transform: TransformRule, x: jax.Array, axis: int) -> jax.Array:
    """Return Mᵀ x, whose dot products with what blocks hold are those of ``x`` with the values.

    With values x̂ = M y, where y is what blocks hold and M the inverse of the transform, q·x̂ = (Mᵀ q)·y.
    """
    x_float32 = x.astype(jnp.float32)
    (adjoint,) = jax.linear_transpose(lambda y: transform.inverse(y, axis), x_float32)(x_float32)
    return adjoint.astype(x.dtype)
