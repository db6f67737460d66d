"""Granularities by name: which elements of a page share a scale."""

import re
from collections.abc import Sequence
from typing import Any

GROUP = re.compile(r"group([1-9][0-9]*)")


def check_granularity(name: str, granularity: str, offered: Sequence[str]) -> None:
    """ValueError unless the format ``name`` offers the granularity."""
    if granularity not in offered:
        raise ValueError(
            f"granularity must be one of {', '.join(offered)} for {name}, but came as {granularity!r}."
        )


def page_block(quantizer: Any, shape: Sequence[int]) -> tuple[int, ...]:
    """The block of a quantizer on an array (..., slots, head_dim)."""
    if quantizer.granularity == "element":
        return (1,) * len(shape)
    if len(shape) < 2:
        raise ValueError(
            f"array must have at least two axes, (..., slots, head_dim), but came with shape "
            f"{tuple(shape)}; give the block yourself with qpaged.arrays.quantize."
        )
    slots, head_dim = (max(1, length) for length in shape[-2:])
    group = GROUP.fullmatch(quantizer.granularity)
    if group is not None:
        return (1,) * (len(shape) - 1) + (_group(quantizer, int(group[1]), head_dim),)
    last = {"page": (slots, head_dim), "token": (1, head_dim), "channel": (slots, 1)}
    if quantizer.granularity not in last:
        raise ValueError(
            f"granularity must be one of {', '.join(last)}, element, or group and a number, but "
            f"{quantizer.name} has {quantizer.granularity!r}; override Quantizer.block to say what it means."
        )
    return (1,) * (len(shape) - 2) + last[quantizer.granularity]


def _group(quantizer: Any, size: int, head_dim: int) -> int:
    if head_dim % size:
        sizes = {name: GROUP.fullmatch(name) for name in quantizer.granularities}
        fitting = [name for name, group in sizes.items() if group is None or head_dim % int(group[1]) == 0]
        fit = ", ".join(fitting) or "none; take another format, as int8:token"
        raise ValueError(
            f"head_dim must be a multiple of {size} for {quantizer}, whose groups have so many channels, but "
            f"is {head_dim}; granularities of {quantizer.name} that fit it: {fit}."
        )
    return size
