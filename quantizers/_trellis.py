"""trellis2 and trellis3: codes that are read with those before them, as one of 1,024 values."""

from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from qpaged import BlockFitRule, Quantizer, trellis_codes
from quantizers._bfloat16 import LARGEST, NAN, first_of, nearest, of_word, paired, word
from quantizers._moments import NormFit, moments
from quantizers._offset import OffsetInLowerHalf, covering

SMALLEST_SCALE = 2.0**-118  # whose products with all values are normal numbers
States = TypeVar("States", jax.Array, np.ndarray)


class Trellis(Quantizer):
    """What trellises have in common: each value is computed from its state, and looks like chance (QTIP).

    Attributes:
        only: the one of ``granularities`` that a class is of.
        mixing: a factor and an addend, found by trying many: what they make of a state is 16 bits of chance.
        stretch: a path follows values that are so much larger than what is read. A row that is followed
            closely is shorter than itself, and the sum of many rows, as attention takes it, would be, too.
    """

    granularities: ClassVar[tuple[str, ...]] = ("token", "channel")
    state_bits: ClassVar[int] = 10
    only: ClassVar[str]
    mixing: ClassVar[tuple[int, int]]
    stretch: ClassVar[float]

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.granularity != self.only:
            raise ValueError(
                f"granularity must be {self.only} for {type(self).__name__}, but came as "
                f"{self.granularity!r}; quantizers.{self.name}({self.granularity!r}) makes that one."
            )

    def encode(self, units: jax.Array) -> jax.Array:
        values = self.values(np.arange(2**self.state_bits))
        return trellis_codes(units * self.stretch, self.bits, self.state_bits, values)

    def decode(self, codes: jax.Array, dtype: Any) -> jax.Array:
        return self.values(codes).astype(dtype)

    def values(self, states: States) -> States:
        """Return the integers that states stand for."""
        raise NotImplementedError

    def mixed(self, states: States) -> States:
        """Return 16 bits of each state."""
        factor, addend = self.mixing
        return (states * factor + addend) & 0xFFFF


class SumOfFour(Trellis):
    """Values that are nearly gaussian: the sum of four numbers of 4 bits, less 30."""

    deviation: ClassVar[float]
    """Of gaussians that paths follow with the least loss."""

    @property
    def spread(self) -> float:
        """The scale of values whose root mean square is 1."""
        return self.stretch / self.deviation

    def values(self, states: States) -> States:
        mixed = self.mixed(states)
        pairs = (mixed & 0x0F0F) + ((mixed >> 4) & 0x0F0F)
        return (pairs & 0xFF) + (pairs >> 8) - 30


class OfTokens(SumOfFour):
    """A token under one scale, which follows from its norm."""

    only: ClassVar[str] = "token"
    scale_dtype: ClassVar[Any] = jnp.uint16
    nan_scale: ClassVar[int] = NAN
    bound: ClassVar[float] = 384.0  # of one element that has all the norm of 1,024

    @property
    def block_fit(self) -> BlockFitRule:
        return NormFit(self)

    def scale(self, absmax: jax.Array) -> jax.Array:
        rounded = nearest(jnp.clip(absmax, SMALLEST_SCALE, LARGEST))
        return word(jnp.where(absmax == 0, 0, rounded))

    def multiplier(self, scales: jax.Array) -> jax.Array:
        return of_word(scales)

    def error_bound(self, x: jax.Array, multipliers: jax.Array) -> jax.Array:
        return jnp.abs(x) + 30 * jnp.abs(multipliers)


class OfChannels(Trellis):
    """A channel of a page under a scale and an offset, both bfloat16, in one word."""

    only: ClassVar[str] = "channel"
    scale_dtype: ClassVar[Any] = jnp.uint32
    nan_scale: ClassVar[int] = NAN << 16
    offset: ClassVar[OffsetInLowerHalf] = OffsetInLowerHalf()

    def multiplier(self, scales: jax.Array) -> jax.Array:
        return first_of(scales)


@dataclass(frozen=True)
class MomentsFit:
    """Fits the scale and the offset of a channel to the deviation and the mean of its values."""

    quantizer: "Trellis2Channel"

    def scale(self, x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
        mean, deviation, is_zero = moments(x, axes)
        offset = nearest(mean)
        deviation = jnp.maximum(deviation, jnp.abs(mean - offset))
        stored = self.quantizer.scale(deviation) | paired(jnp.zeros_like(offset), offset)
        return jnp.where(is_zero, jnp.uint32(0), stored)


@dataclass(frozen=True)
class Trellis2(OfTokens):
    """A path through 1,024 values between -30 s and 30 s, of 2 bits a step: 2.125 bits an element.

    2 bits and 16 a token, of head_dim 128: s is a bfloat16 that follows from the token's norm. Of gaussians
    0.080 of the power is lost, where ``lloyd2`` loses 0.119; ``+rotate`` makes gaussians of most tokens. An
    element far beyond the others is cut off: no error is more than 30 s and the element.

    Each element is read from its own code and the four before it, and all codes of a token are chosen
    together, by the Viterbi algorithm: some 10,000 operations an element, the better spent on whole pages, as
    with ``+exact128``, than on a token at each step.
    """

    name: ClassVar[str] = "trellis2"
    bits: ClassVar[int] = 2
    gaussian_loss: ClassVar[float] = 0.12  # of 16 channels; of 64 and more 0.080
    mixing: ClassVar[tuple[int, int]] = (53621, 48132)
    deviation: ClassVar[float] = 9.5
    stretch: ClassVar[float] = 1.065


@dataclass(frozen=True)
class Trellis3(OfTokens):
    """What ``trellis2`` does, of 3 bits a step: 3.125 bits an element at head_dim 128.

    Of gaussians 0.021 of the power is lost, where ``lloyd3`` loses 0.034. An element is read from its own
    code, the two before it, and a bit of the one before these.
    """

    name: ClassVar[str] = "trellis3"
    bits: ClassVar[int] = 3
    gaussian_loss: ClassVar[float] = 0.03  # of 16 channels; of 64 and more 0.021
    mixing: ClassVar[tuple[int, int]] = (14867, 11495)
    deviation: ClassVar[float] = 8.8
    stretch: ClassVar[float] = 1.02


@dataclass(frozen=True)
class Trellis2Channel(OfChannels, SumOfFour):
    """What ``trellis2`` does under a scale and an offset for each channel of a page, quantized once.

    They follow from the channel's deviation and its mean: for keys, whose channels differ. 2 bits an element
    and 32 per block: 4 at 16 tokens a page, 2.5 at 64. No error is more than 256 s, in pages of up to 256
    slots.
    """

    granularity: str = "channel"

    name: ClassVar[str] = "trellis2"
    bits: ClassVar[int] = 2
    bound: ClassVar[float] = 256.0
    mixing: ClassVar[tuple[int, int]] = Trellis2.mixing
    deviation: ClassVar[float] = Trellis2.deviation
    stretch: ClassVar[float] = 1.04

    @property
    def block_fit(self) -> BlockFitRule:
        return MomentsFit(self)

    def scale(self, absmax: jax.Array) -> jax.Array:
        rounded = nearest(jnp.clip(absmax * self.spread, SMALLEST_SCALE, LARGEST))
        return paired(jnp.where(absmax == 0, 0, rounded), jnp.zeros_like(absmax))


@dataclass(frozen=True)
class Trellis3Channel(OfChannels):
    """A path through 1,024 values from -128 s to 127 s, of 3 bits a step, under each channel's offset.

    The values are evenly distributed, and reach the least and the greatest value of the channel in a page,
    which is quantized once. 3 bits an element and 32 per block: 5 at 16 tokens a page, 3.5 at 64. No error is
    more than 256 s.
    """

    granularity: str = "channel"

    name: ClassVar[str] = "trellis3"
    bits: ClassVar[int] = 3
    bound: ClassVar[float] = 256.0
    mixing: ClassVar[tuple[int, int]] = (14401, 46058)
    stretch: ClassVar[float] = 1.0

    def scale(self, absmax: jax.Array) -> jax.Array:
        return self.fit(-absmax, absmax)

    def fit(self, low: jax.Array, high: jax.Array) -> jax.Array:
        stored = covering(low, high, -128 / self.stretch, 127 / self.stretch)
        return jnp.where((low == 0) & (high == 0), jnp.uint32(0), stored)

    def values(self, states: States) -> States:
        return (self.mixed(states) >> 8) - 128


def trellis2(granularity: str = "token") -> Quantizer:
    """Return :class:`Trellis2`, or :class:`Trellis2Channel` at ``channel``."""
    return Trellis2Channel() if granularity == "channel" else Trellis2(granularity)


def trellis3(granularity: str = "token") -> Quantizer:
    """Return :class:`Trellis3`, or :class:`Trellis3Channel` at ``channel``."""
    return Trellis3Channel() if granularity == "channel" else Trellis3(granularity)
