"""int4: two codes to a byte."""

from dataclasses import dataclass
from typing import ClassVar

from qpaged import Quantizer
from quantizers._floor import Floor
from quantizers._nearest import Nearest, Whole

GRANULARITIES = ("group32", "group64", "group128", "token", "page", "channel")
SHARED = ("page", "channel")


def int4(granularity: str = "group32", whole: bool = False) -> Quantizer:
    """Return the int4 format of a granularity: floors where tokens share scales, nearest where they do not.

    Args:
        granularity: one of GRANULARITIES.
        whole: True for nearest codes also where tokens share scales, of pages that are quantized once.
    """
    if whole:
        return Int4Whole(granularity)
    return Int4Floor(granularity) if granularity in SHARED else Int4(granularity)


@dataclass(frozen=True)
class Int4(Nearest):
    """c = round(x / s), s = extreme / -8: the value of largest magnitude maps to -8, whatever its sign.

    All 16 codes are used, and none is spent on a magnitude that does not occur (ggml's q4_0 does the same).
    The scale is a bfloat16, stored as its bits, and carries the sign.

    4 bits an element and 16 per group or token: 4.5 at ``group32``, 4.25 at ``group64``, 4.125 at
    ``group128`` and at ``token`` with head_dim 128. The error is at most s / 2 up to 7.5 s on the extreme's
    opposite side, and x - 7 s from there on, at most s.
    """

    name: ClassVar[str] = "int4"
    granularities: ClassVar = GRANULARITIES
    bits: ClassVar[int] = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.granularity in SHARED:
            raise ValueError(f"granularity must not be {self.granularity} for Int4; that is Int4Floor.")


@dataclass(frozen=True)
class Int4Whole(Whole):
    """What :class:`Int4` does with a group, for a page or a channel of it that is quantized once.

    4 bits an element and 16 per block: 5 at ``channel`` and 16 tokens a page, 4.25 at 64.
    """

    whole: bool = True

    name: ClassVar[str] = "int4"
    granularities: ClassVar = GRANULARITIES
    bits: ClassVar[int] = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        check_shared(self, SHARED, "Int4")


@dataclass(frozen=True)
class Int4Floor(Floor):
    """c = floor(x / s), read back as (c + 1/2) s, with s a power of two and absmax < 8 s: int8's rule.

    The same codes in whatever order tokens are written, and an error of at most s / 2; the scale is a byte.

    4 bits an element and 8 per block: 4.004 at ``page`` (16 slots of 128), 4.5 at ``channel``.
    """

    name: ClassVar[str] = "int4"
    granularities: ClassVar = GRANULARITIES
    bits: ClassVar[int] = 4
    headroom: ClassVar[int] = 3

    @property
    def of_whole_blocks(self) -> Int4Whole:
        return Int4Whole(self.granularity)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_shared(self, SHARED, "Int4")


def check_shared(quantizer: Quantizer, shared: tuple[str, ...], others: str) -> None:
    """Raise ValueError if tokens share no scales at the granularity; ``others`` is the class for that."""
    if quantizer.granularity not in shared:
        name = type(quantizer).__name__
        raise ValueError(f"granularity must be one of {', '.join(shared)} for {name}; others are {others}.")
