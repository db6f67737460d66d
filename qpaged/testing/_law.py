"""The laws by number: their names, and what relies on each."""

from collections.abc import Callable

LAWS = {
    1: ("error", "formats are chosen by how far a value read back may be from what was written"),
    2: ("order", "prefix caching and chunked prefill rely on bits that do not tell how a page was filled"),
    3: ("locality", "sequences share one pool, and a write to one must leave the others' bits alone"),
    4: (
        "totality",
        "padding, inactive rows and missing pages are indices out of range, where nothing raises",
    ),
    5: ("cost", "a decode step runs once a token, and must not pay for the size of the pool"),
    6: ("truth", "memory is planned by the bytes that formats promise"),
    7: ("sameness", "models are written once, for plain pages and for quantized ones"),
    8: ("travel", "pages are copied, swapped and saved, and codes mean nothing without their own scales"),
    9: ("reuse", "pages go from one sequence to the next, which may see nothing of the one before"),
}

Check = Callable[[object, str], None]
"""``check(condition, failure)`` raises AssertionError with ``failure`` unless the condition is true."""


def law(number: int, subject: object) -> Check:
    """Return a check whose errors name the law, the format and what relies on the law."""
    name, reason = LAWS[number]

    def check(condition: object, failure: str) -> None:
        if not condition:
            raise AssertionError(
                f"law {number}, {name}: {subject} breaks it: {failure}. What it is for: {reason}."
            )

    return check
