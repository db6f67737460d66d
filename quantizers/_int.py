"""int3 to int6: integers of so many bits, of three kinds by who shares a scale.

Nearest codes where no tokens do, floors where they do, and nearest codes again of pages that are quantized
once.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

from qpaged import Quantizer
from quantizers._floor import Floor
from quantizers._nearest import Nearest, Whole

GRANULARITIES = ("group32", "group64", "group128", "token", "page", "channel")
SHARED = ("page", "channel")  # where tokens share a scale


class OfOwnScales(Nearest):
    """Codes of a group or a token, which has a scale of its own."""

    granularities: ClassVar[tuple[str, ...]] = GRANULARITIES

    def __post_init__(self) -> None:
        super().__post_init__()
        check_not_shared(self)


class OfWholeBlocks(Whole):
    """Codes of a page or a channel of it, which are quantized once."""

    granularities: ClassVar[tuple[str, ...]] = GRANULARITIES

    def __post_init__(self) -> None:
        super().__post_init__()
        check_shared(self)


class OfGrowingBlocks(Floor):
    """Codes of a page or a channel of it, which grow as tokens arrive."""

    granularities: ClassVar[tuple[str, ...]] = GRANULARITIES

    def __post_init__(self) -> None:
        super().__post_init__()
        check_shared(self)


def check_not_shared(quantizer: Quantizer) -> None:
    """Raise ValueError if tokens share scales at the quantizer's granularity."""
    if quantizer.granularity in SHARED:
        name = type(quantizer).__name__
        raise ValueError(f"granularity must not be {quantizer.granularity} for {name}; that is {name}Floor.")


def check_shared(quantizer: Quantizer) -> None:
    """Raise ValueError unless tokens share scales at the quantizer's granularity."""
    if quantizer.granularity not in SHARED:
        name = type(quantizer).__name__
        raise ValueError(
            f"granularity must be one of {', '.join(SHARED)} for {name}, but came as "
            f"{quantizer.granularity!r}; others are {quantizer.name.capitalize()}."
        )


@dataclass(frozen=True)
class Int3(OfOwnScales):
    """c = round(x / s), s = extreme / -4: 8 codes, in planes of 2 bits and of 1.

    The value of largest magnitude maps to -4, whatever its sign. 3 bits an element and 16 per group or
    token: 3.5 at ``group32``, 3.25 at ``group64``, 3.125 at ``group128`` and at ``token`` with head_dim 128.
    The error is at most s / 2 up to 3.5 s on the extreme's opposite side, and x - 3 s from there on.
    """

    name: ClassVar[str] = "int3"
    bits: ClassVar[int] = 3


@dataclass(frozen=True)
class Int3Whole(OfWholeBlocks):
    """What :class:`Int3` does with a group, for a page or a channel of it that is quantized once.

    3 bits an element and 16 per block: 4 at ``channel`` and 16 tokens a page, 3.25 at 64.
    """

    whole: bool = field(default=True, init=False)

    name: ClassVar[str] = "int3"
    bits: ClassVar[int] = 3


@dataclass(frozen=True)
class Int3Floor(OfGrowingBlocks):
    """c = floor(x / s), read back as (c + 1/2) s, with s a power of two and absmax < 4 s: int8's rule.

    3 bits an element and 8 per block: 3.004 at ``page`` (16 slots of 128), 3.5 at ``channel``.
    """

    name: ClassVar[str] = "int3"
    bits: ClassVar[int] = 3
    headroom: ClassVar[int] = 2

    @property
    def of_whole_blocks(self) -> Int3Whole:
        return Int3Whole(self.granularity)


@dataclass(frozen=True)
class Int4(OfOwnScales):
    """c = round(x / s), s = extreme / -8: 16 codes, two to a byte.

    The value of largest magnitude maps to -8, whatever its sign, as in ggml's q4_0. 4 bits an element and 16
    per group or token: 4.5 at ``group32``, 4.25 at ``group64``, 4.125 at ``group128`` and at ``token`` with
    head_dim 128.
    The error is at most s / 2 up to 7.5 s on the extreme's opposite side, and x - 7 s from there on.
    """

    name: ClassVar[str] = "int4"
    bits: ClassVar[int] = 4


@dataclass(frozen=True)
class Int4Whole(OfWholeBlocks):
    """What :class:`Int4` does with a group, for a page or a channel of it that is quantized once.

    4 bits an element and 16 per block: 5 at ``channel`` and 16 tokens a page, 4.25 at 64.
    """

    whole: bool = field(default=True, init=False)

    name: ClassVar[str] = "int4"
    bits: ClassVar[int] = 4


@dataclass(frozen=True)
class Int4Floor(OfGrowingBlocks):
    """c = floor(x / s), read back as (c + 1/2) s, with s a power of two and absmax < 8 s: int8's rule.

    4 bits an element and 8 per block: 4.004 at ``page`` (16 slots of 128), 4.5 at ``channel``.
    """

    name: ClassVar[str] = "int4"
    bits: ClassVar[int] = 4
    headroom: ClassVar[int] = 3

    @property
    def of_whole_blocks(self) -> Int4Whole:
        return Int4Whole(self.granularity)


@dataclass(frozen=True)
class Int5(OfOwnScales):
    """c = round(x / s), s = extreme / -16: 32 codes, in planes of 4 bits and of 1.

    The value of largest magnitude maps to -16, whatever its sign. 5 bits an element and 16 per group or
    token: 5.5 at ``group32``, 5.25 at ``group64``, 5.125 at ``group128`` and at ``token`` with head_dim 128.
    The error is at most s / 2 up to 15.5 s on the extreme's opposite side, and x - 15 s from there on.
    """

    name: ClassVar[str] = "int5"
    bits: ClassVar[int] = 5


@dataclass(frozen=True)
class Int5Whole(OfWholeBlocks):
    """What :class:`Int5` does with a group, for a page or a channel of it that is quantized once.

    5 bits an element and 16 per block: 6 at ``channel`` and 16 tokens a page, 5.25 at 64.
    """

    whole: bool = field(default=True, init=False)

    name: ClassVar[str] = "int5"
    bits: ClassVar[int] = 5


@dataclass(frozen=True)
class Int5Floor(OfGrowingBlocks):
    """c = floor(x / s), read back as (c + 1/2) s, with s a power of two and absmax < 16 s: int8's rule.

    5 bits an element and 8 per block: 5.004 at ``page`` (16 slots of 128), 5.5 at ``channel``.
    """

    name: ClassVar[str] = "int5"
    bits: ClassVar[int] = 5
    headroom: ClassVar[int] = 4

    @property
    def of_whole_blocks(self) -> Int5Whole:
        return Int5Whole(self.granularity)


@dataclass(frozen=True)
class Int6(OfOwnScales):
    """c = round(x / s), s = extreme / -32: 64 codes, in planes of 4 bits and of 2.

    The value of largest magnitude maps to -32, whatever its sign. 6 bits an element and 16 per group or
    token: 6.5 at ``group32``, 6.25 at ``group64``, 6.125 at ``group128`` and at ``token`` with head_dim 128.
    The error is at most s / 2 up to 31.5 s on the extreme's opposite side, and x - 31 s from there on.
    """

    name: ClassVar[str] = "int6"
    bits: ClassVar[int] = 6


@dataclass(frozen=True)
class Int6Whole(OfWholeBlocks):
    """What :class:`Int6` does with a group, for a page or a channel of it that is quantized once.

    6 bits an element and 16 per block: 7 at ``channel`` and 16 tokens a page, 6.25 at 64.
    """

    whole: bool = field(default=True, init=False)

    name: ClassVar[str] = "int6"
    bits: ClassVar[int] = 6


@dataclass(frozen=True)
class Int6Floor(OfGrowingBlocks):
    """c = floor(x / s), read back as (c + 1/2) s, with s a power of two and absmax < 32 s: int8's rule.

    6 bits an element and 8 per block: 6.004 at ``page`` (16 slots of 128), 6.5 at ``channel``.
    """

    name: ClassVar[str] = "int6"
    bits: ClassVar[int] = 6
    headroom: ClassVar[int] = 5

    @property
    def of_whole_blocks(self) -> Int6Whole:
        return Int6Whole(self.granularity)


def by_granularity(
    own: type[Quantizer], whole_blocks: type[Quantizer], floor: type[Quantizer]
) -> Callable[..., Quantizer]:
    """Return the function of an entry point, which makes the class that a granularity calls for."""

    def make(granularity: str = GRANULARITIES[0], whole: bool = False) -> Quantizer:
        """Return the format of a granularity.

        Args:
            granularity: one of GRANULARITIES.
            whole: True where tokens share scales, and pages are quantized once.
        """
        if whole:
            return whole_blocks(granularity)
        return floor(granularity) if granularity in SHARED else own(granularity)

    return make


int3 = by_granularity(Int3, Int3Whole, Int3Floor)
int4 = by_granularity(Int4, Int4Whole, Int4Floor)
int5 = by_granularity(Int5, Int5Whole, Int5Floor)
int6 = by_granularity(Int6, Int6Whole, Int6Floor)
