"""The grammar of formats: ``name[:granularity][+wrapper]...``, as ``int4:group32+rotate``."""

import re
from typing import NamedTuple

WORD = r"[^:+/,;\s]+"
GRAMMAR = re.compile(rf"(?P<name>{WORD})(:(?P<granularity>{WORD}))?(?P<wrappers>(\+{WORD})*)")


class Spelling(NamedTuple):
    """The parts of a spelling; ``granularity`` is None for the format's default."""

    name: str
    granularity: str | None
    wrappers: tuple[str, ...]


def parse(spelling: str) -> Spelling:
    """Return the parts of a spelling.

    Raises:
        ValueError: the spelling is not of the grammar.
    """
    match = GRAMMAR.fullmatch(spelling)
    if match is None:
        raise ValueError(
            f"{spelling!r} is no format; write NAME, NAME:GRANULARITY or NAME+WRAPPER, as int8, int8:token "
            f"or int8+rotate."
        )
    wrappers = tuple(match["wrappers"].split("+")[1:])
    return Spelling(match["name"], match["granularity"], wrappers)
