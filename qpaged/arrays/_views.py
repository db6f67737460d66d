"""Views: arrays read in another way than they are stored; not to be written to."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from qpaged.arrays._packing import unpack_place
from qpaged.arrays._quantized import QuantizedArray


@dataclass(frozen=True)
class View:
    """A format read in another way than it is stored; not to be written to."""

    quantizer: Any
    writable: ClassVar[bool] = False

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # what copy and pickle look for before there is a quantizer
            raise AttributeError(name)
        return getattr(self.quantizer, name)


@dataclass(frozen=True)
class Converted(View):
    """A format read as another dtype than its codes were made for."""

    dtype: Any = None

    def decode(self, codes: jax.Array, dtype: Any) -> jax.Array:
        return self.quantizer.decode(codes, self.dtype).astype(dtype)

    def code_dtype(self, dtype: Any) -> Any:
        return self.quantizer.code_dtype(self.dtype)


@dataclass(frozen=True)
class Unpacked(View):
    """A format whose codes are one an element."""

    bits: ClassVar[int] = 8


@dataclass(frozen=True)
class Stored(View):
    """A format read as its blocks hold it, channels transformed."""

    transforms: ClassVar[bool] = False


@dataclass(frozen=True)
class Factored(View):
    """A format read through float32 factors and offsets instead of its stored scales."""

    past_end: ClassVar[float] = math.nan
    outer_dtype: ClassVar[Any] = None

    def multiplier(self, scales: jax.Array) -> jax.Array:
        return scales

    def shift(self, scales: jax.Array) -> None:
        """None: the offsets are an array of their own."""


def keeps_channels(array: QuantizedArray) -> bool:
    """Whether it matters to the array which axis the channels are on."""
    return array.packing > 1 or array.quantizer.transforms


def cut_channels(array: QuantizedArray) -> QuantizedArray | None:
    """The array with its codes one an element, so that channels may be taken apart; None if they may not."""
    return None if array.quantizer.transforms else one_an_element(array)


def one_an_element(array: QuantizedArray) -> QuantizedArray:
    """The array with its codes unpacked."""
    if array.packing == 1:
        return array
    return array.like(array.unpacked(), *array.parts, quantizer=Unpacked(array.quantizer), channel_axis=-1)


def places(array: QuantizedArray) -> list[QuantizedArray] | None:
    """For each place in a byte the codes there, as an array of every so many channels; None if there is one
    place, or blocks do not have the same channels at each."""
    several, axis = array.packing, array.channel_axis % array.ndim
    block = array.block[axis]
    if several == 1 or (block > 1 and block % several):
        return None
    quantizer, view = array.quantizer, Unpacked(array.quantizer)

    def at(place: int) -> QuantizedArray:
        codes = unpack_place(array.codes, quantizer.bits, place, quantizer.code_dtype(array.dtype))
        parts: list[Any] = [*array.parts]
        if block == 1:
            parts = [p if p is None else lax.slice_in_dim(p, place, None, several, axis) for p in parts]
        return array.like(codes, *parts, quantizer=view, channel_axis=-1)

    return [at(place) for place in range(several)]


def factored(array: QuantizedArray) -> QuantizedArray:
    """``array`` with float32 factors for scales, second level included, and its offsets apart."""
    if isinstance(array.quantizer, Factored):
        return array
    return array.like(array.codes, array.multipliers(), array.shift(), quantizer=Factored(array.quantizer))


def scaled(array: QuantizedArray, factor: jax.Array) -> QuantizedArray:
    """``array`` times a scalar: the codes stay, the scales become float32 factors."""
    factor = jnp.asarray(factor).astype(jnp.float32)
    if array.scales is None:
        one = jnp.ones((1,) * array.ndim, jnp.float32)
        quantizer = Factored(Converted(array.quantizer, array.dtype))
        return array.like(array.codes, one * factor, quantizer=quantizer)
    view = factored(array)
    offsets = None if view.offsets is None else view.offsets * factor
    return view.like(view.codes, view.scales * factor, offsets)


def past_end(array: QuantizedArray) -> tuple[Any, Any] | None:
    """Codes and scales that read as NaN; None where the stored scales have no such value."""
    if array.scales is not None:
        scale = array.quantizer.past_end
        return None if scale is None else (0, scale)
    dtype, quantizer = array.dtype, array.quantizer
    while isinstance(quantizer, Converted):
        dtype, quantizer = quantizer.dtype, quantizer.quantizer
    return int(np.full((), np.nan, dtype).view(array.folded.dtype)), None


def convert(array: QuantizedArray, dtype: Any) -> QuantizedArray:
    """Another logical floating-point dtype; codes and scales stay."""
    dtype = jnp.dtype(dtype)
    quantizer: Any = array.quantizer
    if array.scales is None or not quantizer.writable:  # what the codes mean hangs on the dtype they had
        quantizer = Converted(quantizer, array.dtype)
    return array.like(array.codes, *array.parts, quantizer=quantizer, dtype=dtype)


def stored(array: QuantizedArray) -> QuantizedArray:
    """What the blocks of ``array`` hold: its channels as the format transforms them."""
    if not array.quantizer.transforms:
        return array
    return array.like(array.codes, *array.parts, quantizer=Stored(array.quantizer))


def adjoint(quantizer: Any, x: jax.Array, axis: int) -> jax.Array:
    """What ``x`` is to be multiplied as with transformed channels, to give what it gives with plain ones.

    With values x̂ = M y, where y is what blocks hold and M the inverse of the transform, q·x̂ = (Mᵀ q)·y.
    """
    wide = x.astype(jnp.float32)
    (turned,) = jax.linear_transpose(lambda y: quantizer.inverse(y, axis), wide)(wide)
    return turned.astype(x.dtype)
