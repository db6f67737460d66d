"""lloyd2, lloyd3 and lloyd4: the levels that lose least of a gaussian, under a token's norm."""

from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from qpaged import BlockFitRule, Quantizer
from quantizers._bfloat16 import LARGEST, NAN, away_from_zero, nearest, of_word, word

SQUARE_BITS = 16  # below the point, of squares of levels, which are summed as integers
SMALLEST_SCALE = 2.0**-122  # whose products with all levels are normal numbers


@dataclass(frozen=True)
class NormFit:
    """Fits a block's scale to its norm, so that the block keeps it when it is read.

    Sums are of integers, and so exact: the same scale in every program (law 2).

    Attributes:
        quantizer: with the levels.
    """

    quantizer: "Lloyd"

    def scale(self, x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
        quantizer, largest = self.quantizer, jnp.abs(x).max(axis=axes, keepdims=True)
        n = x.size // largest.size
        bits = min(11, (31 - (n - 1).bit_length()) // 2)  # of values, whose squares are summed in 32
        unit = word(jnp.minimum(away_from_zero(largest), LARGEST))
        values = jnp.round(jnp.abs(quantizer.in_units(x, unit)) * 2.0**bits).astype(jnp.uint32)
        power = (values * values).sum(axis=axes, keepdims=True, dtype=jnp.uint32).astype(jnp.float32)
        rms = jnp.maximum(of_word(unit) * (jnp.sqrt(power / n) * 2.0**-bits), SMALLEST_SCALE)
        codes = quantizer.encode_under(x, quantizer.scale(rms * quantizer.spread))
        squares = jnp.round(jnp.square(quantizer.decode(codes, jnp.float32)) * 2.0**SQUARE_BITS)
        kept = squares.astype(jnp.int32).sum(axis=axes, keepdims=True, dtype=jnp.int32).astype(jnp.float32)
        scale = rms * jnp.sqrt(n * 2.0**SQUARE_BITS / kept)
        return quantizer.scale(jnp.where(largest == 0, 0, scale)).squeeze(axes)


class Lloyd(Quantizer):
    """The nearest of 2^bits levels that lose least of a unit gaussian, times s (Lloyd 1982, Max 1960).

    s brings a token back to its own norm, to a few hundredths; a bfloat16, stored as its bits. Codes are a
    sign above the number of a magnitude.
    """

    granularities: ClassVar[tuple[str, ...]] = ("token",)
    scale_dtype: ClassVar[Any] = jnp.uint16
    nan_scale: ClassVar[int] = NAN
    bound: ClassVar[float] = 32.0  # of one element that has all the norm of 1,024
    magnitudes: ClassVar[tuple[float, ...]]

    @property
    def growth(self) -> None:
        return None

    @property
    def block_fit(self) -> BlockFitRule:
        return NormFit(self)

    @property
    def spread(self) -> float:
        """The scale of a gaussian by its root mean square: 1 / sqrt(1 - the power that the levels lose)."""
        return {2: 1.0645, 3: 1.0177, 4: 1.0048}[self.bits]

    @property
    def gaps(self) -> tuple[float, ...]:
        """What lies between neighbouring magnitudes."""
        return tuple(high - low for low, high in zip(self.magnitudes, self.magnitudes[1:], strict=False))

    def scale(self, absmax: jax.Array) -> jax.Array:
        rounded = nearest(jnp.clip(absmax, SMALLEST_SCALE, LARGEST))
        return word(jnp.where(absmax == 0, 0, rounded))

    def multiplier(self, scales: jax.Array) -> jax.Array:
        return of_word(scales)

    def encode(self, units: jax.Array) -> jax.Array:
        size = jnp.abs(units)
        lower = zip(self.magnitudes, self.gaps, strict=False)
        code = sum((size > low + gap / 2).astype(jnp.uint8) for low, gap in lower)
        return code | jnp.where(jnp.signbit(units), jnp.uint8(len(self.magnitudes)), jnp.uint8(0))

    def decode(self, codes: jax.Array, dtype: Any) -> jax.Array:
        number = (codes & (len(self.magnitudes) - 1)).astype(jnp.float32)
        # A sum of the gaps below, which is exact, and of which kernels make arithmetic.
        size = jnp.full_like(number, self.magnitudes[0])
        for below, gap in enumerate(self.gaps):
            size += gap * jnp.clip(number - below, 0, 1)
        size = size.astype(dtype)
        return jnp.where(codes & len(self.magnitudes) != 0, -size, size)

    def error_bound(self, x: jax.Array, multipliers: jax.Array) -> jax.Array:
        factors = jnp.abs(multipliers)
        size = jnp.abs(x) / jnp.where(factors != 0, factors, 1)
        inside = max(self.magnitudes[0], *(gap / 2 for gap in self.gaps)) * (1 + 2.0**-18)
        return factors * jnp.maximum(size - self.magnitudes[-1] + 2.0**-18 * size, inside)


@dataclass(frozen=True)
class Lloyd2(Lloyd):
    """The levels that lose least of a gaussian, 0.453 s, 1.508 s and their negatives: 2.125 bits an element.

    2 bits and 16 a token, of head_dim 128; s brings a token back to its norm. Lloyd (1982) and Max (1960). Of
    gaussians 0.12 of the power is lost. Made for ``+rotate``, which makes gaussians of most tokens; without
    it, what is far above the others is cut off: the error is at most 0.53 s up to the last level, and what is
    beyond it.
    """

    name: ClassVar[str] = "lloyd2"
    bits: ClassVar[int] = 2
    magnitudes: ClassVar[tuple[float, ...]] = (0.453125, 1.5078125)


@dataclass(frozen=True)
class Lloyd3(Lloyd):
    """What ``lloyd2`` does with eight levels, up to 2.156 s: 3.125 bits an element at head_dim 128.

    Of gaussians 0.034 of the power is lost. The error is at most 0.41 s up to the last level.
    """

    name: ClassVar[str] = "lloyd3"
    bits: ClassVar[int] = 3
    magnitudes: ClassVar[tuple[float, ...]] = (0.2451171875, 0.7578125, 1.34375, 2.15625)


@dataclass(frozen=True)
class Lloyd4(Lloyd):
    """What ``lloyd2`` does with sixteen levels, up to 2.734 s: 4.125 bits an element at head_dim 128.

    Of gaussians 0.0093 of the power is lost. The error is at most 0.34 s up to the last level.
    """

    name: ClassVar[str] = "lloyd4"
    bits: ClassVar[int] = 4
    magnitudes: ClassVar[tuple[float, ...]] = (
        *(0.1279296875, 0.388671875, 0.65625, 0.94140625),
        *(1.2578125, 1.6171875, 2.0625, 2.734375),
    )
