"""fp8: one byte of sign, exponent and mantissa, under power-of-two scales or static ones."""

from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from qpaged import PowerOfTwoQuantizer, Quantizer
from quantizers import _float8

GRANULARITIES = ("page", "token", "channel", "tensor", "head")
STATIC = ("tensor", "head")
SMALLEST_SCALE = 2.0**-110  # times the smallest code of e5m2 it is a normal number
NEGATIVE_ZERO = 0x80


def fp8_e4m3(granularity: str = "page") -> Quantizer:
    """Return the e4m3 format of a granularity, with static scales for tensor and head."""
    return Fp8E4M3Static(granularity) if granularity in STATIC else Fp8E4M3(granularity)


def fp8_e5m2(granularity: str = "page") -> Quantizer:
    """Return the e5m2 format of a granularity, with static scales for tensor and head."""
    return Fp8E5M2Static(granularity) if granularity in STATIC else Fp8E5M2(granularity)


class Fp8(PowerOfTwoQuantizer):
    """x / s rounded to nearest even in an 8-bit float, stored as its bits in a uint8.

    Integers, because a pool stored as fp8 is widened whole by XLA on CPU at every write; kernels bitcast
    after the load. Scales are powers of two, so growing one only moves exponents: exact, except for values
    that fall among the subnormals, which are rounded again. The roundings of any number of growths add up
    to less than one subnormal step, 2^-resolution s, and two orders of writing differ by no more.

    8 bits an element and 8 per block.
    """

    granularities: ClassVar[tuple[str, ...]] = GRANULARITIES
    float8: ClassVar[Any]
    mantissa: ClassVar[int]

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_static(self, False)

    @property
    def order_bound(self) -> float:
        return 0.0 if self.granularity == "token" else 2.0**-self.resolution

    def encode(self, units: jax.Array) -> jax.Array:
        return _float8.encode(units, self.float8)

    def decode(self, codes: jax.Array, dtype: Any) -> jax.Array:
        return _float8.decode(codes, self.float8, dtype)

    def error_bound(self, x: jax.Array, multipliers: jax.Array) -> jax.Array:
        """|x| 2^-(mantissa + 1) where the value is normal, one subnormal step where it is not."""
        return jnp.abs(x) * 2.0 ** -(self.mantissa + 1) + 2.0**-self.resolution * multipliers


@dataclass(frozen=True)
class Fp8E4M3(Fp8):
    """fp8 with 4 exponent and 3 mantissa bits (OCP E4M3FN): absmax < 256 s, subnormal step 2^-9 s."""

    name: ClassVar[str] = "fp8_e4m3"
    bound: ClassVar[float] = 8.0
    headroom: ClassVar[int] = 8
    resolution: ClassVar[int] = 9
    float8: ClassVar[Any] = jnp.float8_e4m3fn
    mantissa: ClassVar[int] = 3


@dataclass(frozen=True)
class Fp8E5M2(Fp8):
    """fp8 with 5 exponent and 2 mantissa bits (OCP E5M2): absmax < 32768 s, subnormal step 2^-16 s."""

    name: ClassVar[str] = "fp8_e5m2"
    bound: ClassVar[float] = 2048.0
    headroom: ClassVar[int] = 15
    resolution: ClassVar[int] = 16
    float8: ClassVar[Any] = jnp.float8_e5m2
    mantissa: ClassVar[int] = 2


class StaticFp8(Quantizer):
    """x / s rounded to nearest even in an 8-bit float, saturating, with a scale s that is given.

    One float32 s for all keys, or all values, of a layer (``tensor``), or for those of each KV head
    (``head``): what checkpoints carry as ``k_scale`` and ``v_scale``, and what vLLM, SGLang, TensorRT-LLM and
    FlashInfer hold. It is 1 until :meth:`qpaged.PagedAttentionCache.with_scales` sets it, and nothing that is
    written, reset or copied changes it. Calibration takes absmax / largest. Values beyond the largest number
    of the format times s become that.

    8 bits an element, and 32 for a pool or each of its heads.
    """

    granularities: ClassVar[tuple[str, ...]] = GRANULARITIES
    float8: ClassVar[Any]

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_static(self, True)

    @property
    def largest(self) -> float:
        """The largest number of the format, in units of the scale."""
        return float(jnp.finfo(self.float8).max)

    def scale(self, absmax: jax.Array) -> jax.Array:
        # A product, since XLA may or may not turn a division by a constant into one.
        scale = jnp.maximum(absmax * jnp.float32(1 / self.largest), SMALLEST_SCALE)
        return jnp.where(absmax > 0, scale, 1)

    def encode(self, units: jax.Array) -> jax.Array:
        codes = _float8.encode(units, self.float8)
        # Zeros have one code, whatever their sign.
        return jnp.where(codes == NEGATIVE_ZERO, 0, codes).astype(jnp.uint8)

    def decode(self, codes: jax.Array, dtype: Any) -> jax.Array:
        return _float8.decode(codes, self.float8, dtype)

    def error_bound(self, x: jax.Array, multipliers: jax.Array) -> jax.Array:
        """Half a step of the format, or what is beyond its largest number; and float32 roundings."""
        info, size = jnp.finfo(self.float8), jnp.abs(x)
        half_step = jnp.maximum(size, float(info.smallest_normal) * multipliers) * (float(info.eps) / 2)
        return jnp.maximum(half_step, size - self.largest * multipliers) + size * 2.0**-21


@dataclass(frozen=True)
class Fp8E4M3Static(StaticFp8):
    """fp8 with 4 exponent and 3 mantissa bits (OCP E4M3FN) under static scales: from 2^-9 s to 448 s.

    An error is at most |x| / 16 between 2^-6 s and 448 s, half a step below, and |x| - 448 s beyond.
    """

    name: ClassVar[str] = "fp8_e4m3"
    bound: ClassVar[float] = 16.0
    float8: ClassVar[Any] = jnp.float8_e4m3fn


@dataclass(frozen=True)
class Fp8E5M2Static(StaticFp8):
    """fp8 with 5 exponent and 2 mantissa bits (OCP E5M2) under static scales: from 2^-16 s to 57344 s.

    An error is at most |x| / 8 between 2^-14 s and 57344 s, half a step below, and |x| - 57344 s beyond.
    """

    name: ClassVar[str] = "fp8_e5m2"
    bound: ClassVar[float] = 4096.0
    float8: ClassVar[Any] = jnp.float8_e5m2


def _check_static(quantizer: Quantizer, static: bool) -> None:
    """Raise ValueError for a granularity of the other class of a name."""
    if quantizer.has_static_scales != static:
        raise ValueError(
            f"granularity must {'' if static else 'not '}be tensor or head for {type(quantizer).__name__}, "
            f"but came as {quantizer.granularity!r}; qpaged.get_quantizer takes the right class."
        )
