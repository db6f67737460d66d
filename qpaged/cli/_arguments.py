"""Reads numbers from the command line; argparse puts the flag's name before what they refuse.

The library refuses numbers that are out of range: see ``in_words_of_flags``.
"""

import argparse
import re


def whole_number(text: str) -> int:
    """Return a whole number."""
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number; 16 is.") from None


def number(text: str) -> float:
    """Return a number."""
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number; 5 and 0.9 are.") from None


def token_count(text: str) -> int:
    """Return a number of tokens, as ``"32768"`` or ``"32k"``."""
    match = re.fullmatch(r"(-?\d+)\s*([kK]?)", text.strip())
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of tokens; 32768 or 32k is.")
    return int(match[1]) * (1024 if match[2] else 1)


def token_counts(text: str) -> tuple[int, ...]:
    """Return numbers of tokens, as ``"1024,4k"``, each once."""
    return tuple(dict.fromkeys(map(token_count, text.split(","))))
