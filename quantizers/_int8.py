"""int8: the default, 8 bits an element and one scale per page, whatever the order of writes."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from qpaged import Quantizer
from quantizers._floor import Floor
from quantizers._nearest import Whole

GRANULARITIES = ("page", "token", "channel")


def int8(granularity: str = "page", whole: bool = False) -> Quantizer:
    """Return the int8 format of a granularity: floors where scales are shared, nearest where they are not.

    Args:
        granularity: one of GRANULARITIES.
        whole: True for nearest codes also where tokens share scales, of pages that are quantized once.
    """
    if whole:
        return Int8Whole(granularity)
    return Int8Token() if granularity == "token" else Int8Floor(granularity)


@dataclass(frozen=True)
class Int8Floor(Floor):
    """c = floor(x / s), read back as (c + 1/2) s, with s a power of two and absmax < 128 s.

    Doubling s is an arithmetic shift, and floor(floor(x) / 2) = floor(x / 2): codes depend on the values
    alone, never on the order or the chunks in which they arrived. The error is at most s / 2, always.
    A block in which anything was written reads a written zero as s / 2.

    8 bits an element and 8 per block: 8.004 at ``page`` (16 slots of 128), 8.5 at ``channel``.
    """

    name: ClassVar[str] = "int8"
    granularities: ClassVar = GRANULARITIES
    headroom: ClassVar[int] = 7

    @property
    def of_whole_blocks(self) -> "Int8Whole":
        return Int8Whole(self.granularity)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.granularity == "token":
            raise ValueError("granularity must not be token for Int8Floor; that is Int8Token, which rounds.")


@dataclass(frozen=True)
class Int8Whole(Whole):
    """c = round(x / s), s = extreme / -128 of a page or a channel of it, which is quantized once.

    8 bits an element and 16 per block: 8.008 at ``page`` (16 slots of 128), 9 at ``channel`` and 16 tokens a
    page, 8.25 at 64.
    """

    whole: bool = field(default=True, init=False)

    name: ClassVar[str] = "int8"
    granularities: ClassVar = GRANULARITIES

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.granularity == "token":
            raise ValueError("granularity must not be token for Int8Whole; that is Int8Token.")


@dataclass(frozen=True)
class Int8Token(Quantizer):
    """c = round(x / s), s = absmax / 127 of one token's head, to nearest even: nothing shared, nothing grows.

    8 bits an element and a float32 per token and head: 8.25 at head_dim 128. More accurate than the
    page's floors, for 3 % more bytes. The error is at most s / 2, but for the float32 roundings of the
    scale, of the division and of the product.
    """

    granularity: str = "token"

    name: ClassVar[str] = "int8"
    granularities: ClassVar = GRANULARITIES
    bound: ClassVar[float] = 0.5 + 127 * 2.0**-22
    levels: ClassVar = (-127.0, 127.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.granularity != "token":
            raise ValueError(f"granularity must be token for Int8Token, but came as {self.granularity!r}.")

    def scale(self, absmax: jax.Array) -> jax.Array:
        # A product, since XLA may or may not turn a division by a constant into one.
        smallest = jnp.finfo(jnp.float32).smallest_normal
        return jnp.where(absmax > 0, jnp.maximum(absmax * jnp.float32(1 / 127), smallest), 0)

    def encode(self, units: jax.Array) -> jax.Array:
        return jnp.clip(jnp.round(units), -127, 127).astype(jnp.int8)

    def decode(self, codes: jax.Array, dtype: Any) -> jax.Array:
        return codes.astype(dtype)
