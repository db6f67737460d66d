"""Granularities by name: which elements of a page share a scale."""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qpaged.formats._contract import Quantizer

GROUP = re.compile(r"group([1-9][0-9]*)")
SHARED = ("page", "channel")
"""Granularities whose scales the tokens of a page share."""
STATIC = ("tensor", "head")
"""Granularities whose scales are shared by all pages: they are given, and nothing that is written changes
them."""


def check_granularity(name: str, granularity: str, offered: Sequence[str]) -> None:
    """Raise ValueError unless the format ``name`` offers the granularity."""
    if granularity not in offered:
        if len(offered) == 1:
            raise ValueError(f"{name} takes only the granularity {offered[0]}, but {granularity!r} came.")
        raise ValueError(
            f"granularity must be one of {', '.join(offered)} for {name}, but came as {granularity!r}."
        )


def page_block(quantizer: "Quantizer", shape: Sequence[int]) -> tuple[int, ...]:
    """Return the block of a quantizer on an array (..., slots, head_dim); heads are the first axis."""
    whole = tuple(max(1, length) for length in shape)
    if quantizer.granularity == "tensor":
        return whole
    if quantizer.granularity == "head":
        return (1, *whole[1:])
    if quantizer.granularity == "element":
        return (1,) * len(shape)
    if len(shape) < 2:
        raise ValueError(
            f"array must have at least two axes, (..., slots, head_dim), but came with shape "
            f"{tuple(shape)}; give the block yourself with qpaged.arrays.quantize."
        )
    slots, head_dim = max(1, shape[-2]), max(1, shape[-1])
    group = GROUP.fullmatch(quantizer.granularity)
    if group is not None:
        group_size = int(group[1])
        _check_group(quantizer, group_size, head_dim)
        return (1,) * (len(shape) - 1) + (group_size,)
    last_extents = {"page": (slots, head_dim), "token": (1, head_dim), "channel": (slots, 1)}
    if quantizer.granularity not in last_extents:
        raise ValueError(
            f"granularity must be one of {', '.join((*STATIC, *last_extents))}, element, or group and a "
            f"number, but "
            f"{quantizer.name} has {quantizer.granularity!r}; override Quantizer.block to say what it means."
        )
    return (1,) * (len(shape) - 2) + last_extents[quantizer.granularity]


def _check_group(quantizer: "Quantizer", size: int, head_dim: int) -> None:
    """Raise ValueError unless groups of ``size`` divide ``head_dim``, naming granularities that do."""
    if head_dim % size == 0:
        return
    fills_bytes = head_dim * quantizer.bits % 8 == 0
    fitting = []
    for granularity in quantizer.granularities:
        group = GROUP.fullmatch(granularity)
        if fills_bytes and (group is None or head_dim % int(group[1]) == 0):
            fitting.append(granularity)
    advice = "another format, as int8:token"
    if fitting:
        advice = f"{quantizer.name} with a granularity that fits: {', '.join(fitting)}"
    raise ValueError(
        f"head_dim must be a multiple of {size} for {quantizer}, as its groups have {size} channels, but is "
        f"{head_dim}; take {advice}."
    )
