"""The laws by number: their names, and what relies on each."""

from typing import Any

LAWS = {
    1: ("error", "people choose a format by how far a value read back may be from what was written"),
    2: ("order", "prefix caching and chunked prefill rely on pages that hold the same bits however they were filled"),
    3: ("locality", "sequences share one pool, and a write to one must leave the others' bits alone"),
    4: ("totality", "padding, inactive rows and missing pages are indices out of range, in programs that cannot raise"),
    5: ("cost", "a decode step runs once a token, and must not pay for the size of the pool"),
    6: ("truth", "who plans memory counts on the bytes that are allocated being those that were promised"),
    7: ("sameness", "models are written once, for plain pages and for quantized ones"),
    8: ("travel", "pages are copied, forked, swapped and saved, and codes mean nothing without their own scales"),
    9: ("reuse", "pages go from one sequence to the next, and nothing of the old one may show in the new"),
}


def require(holds: Any, law: int, subject: Any, what: str) -> None:
    """AssertionError, naming the law, the format and what relies on the law, unless it ``holds``."""
    if not holds:
        name, reason = LAWS[law]
        raise AssertionError(f"law {law}, {name}, is broken by {subject}: {what}. What the law is for: {reason}.")
