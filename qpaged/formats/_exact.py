"""ExactFormat: a format whose caches keep the newest tokens of each sequence, and the first, as written."""

import re
from dataclasses import dataclass
from typing import Any

from qpaged._arguments import check_type, whole_number
from qpaged.formats._contract import Quantizer
from qpaged.formats._registry import get_quantizer, quantizer_from_config

NAME = "+exact"  # in configurations
SUFFIX = re.compile(r"(?P<inner>.*?)(\+exact(?P<exact>[0-9]+))?(\+sink(?P<sink>[0-9]+))?")


@dataclass(frozen=True)
class ExactFormat:
    """A format of a pool with exact pages, spelled ``int4+exact128`` or ``int4+exact128+sink16``.

    A query sees at least the last ``tokens`` tokens up to the furthest that was written, and the first
    ``sinks``, as they were written; a page is quantized once, from all of its rows, when it is left behind.
    ``+sinkN`` alone stands for ``+exact1+sinkN``: the page that is not yet full is exact, too.

    Attributes:
        inner: the format of the other pages; what is given, :attr:`of whole blocks
            <qpaged.Quantizer.of_whole_blocks>`.
        tokens: at least 1.
        sinks: at least 0.

    Raises:
        TypeError: ``inner`` is no quantizer, or a number is no integer.
        ValueError: a number is out of its range.
    """

    inner: Quantizer
    tokens: int = 1
    sinks: int = 0

    def __post_init__(self) -> None:
        check_type("inner", self.inner, Quantizer, "a qpaged.Quantizer", "give that of the packed pages")
        for name, least in (("tokens", 1), ("sinks", 0)):
            if whole_number(name, getattr(self, name)) < least:
                raise ValueError(f"{name} must be at least {least}, but came as {getattr(self, name)}.")
        object.__setattr__(self, "inner", self.inner.of_whole_blocks)

    def window(self, page_size: int) -> int:
        """Return how many of a sequence's newest pages are exact: the open one, and as many as are needed."""
        return -(-(self.tokens - 1) // page_size) + 1

    def sink_pages(self, page_size: int) -> int:
        """Return how many of a sequence's first pages are exact."""
        return -(-self.sinks // page_size)

    @property
    def config(self) -> dict[str, Any]:
        """Everything that makes this format, as plain JSON."""
        return {"name": NAME, "tokens": self.tokens, "sinks": self.sinks, "inner": self.inner.config}

    def __str__(self) -> str:
        sinks = f"+sink{self.sinks}" if self.sinks else ""
        return f"{self.inner}+exact{self.tokens}{sinks}"


PoolQuantizer = Quantizer | ExactFormat
"""The format of a pool that is not plain."""


def format_of_codes(quantizer: PoolQuantizer) -> Quantizer:
    """Return the format of what is packed: beside exact pages, that of the other ones."""
    return quantizer.inner if isinstance(quantizer, ExactFormat) else quantizer


def pool_quantizer(spelling: str) -> PoolQuantizer:
    """Return the format of a pool that a spelling stands for.

    Raises:
        RegistryError: it names no installed format.
        ValueError: a number of exact tokens that is out of its range.
    """
    match = SUFFIX.fullmatch(spelling)
    if match is None or not (match["exact"] or match["sink"]):
        return get_quantizer(spelling)
    return ExactFormat(get_quantizer(match["inner"]), int(match["exact"] or 1), int(match["sink"] or 0))


def pool_quantizer_from_config(config: Any) -> PoolQuantizer:
    """Return the format that ``config`` describes.

    Raises:
        RegistryError, TypeError, ValueError: it describes none.
    """
    if not isinstance(config, dict) or config.get("name") != NAME:
        return quantizer_from_config(config)
    inner = quantizer_from_config(config.get("inner"))
    made = ExactFormat(inner, config.get("tokens"), config.get("sinks"))  # type: ignore[arg-type]  # checked there
    return made
