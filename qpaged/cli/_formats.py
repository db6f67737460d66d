"""The flag ``--formats``: a list of spellings, and of files of formats."""

import argparse
import os
from collections.abc import Sequence

from qpaged import CacheFormat, sweep
from qpaged._bad_argument import BadArgumentError

EVERYTHING = "all"


def named_formats(args: argparse.Namespace, default: str = "") -> list[tuple[str, CacheFormat]]:
    """Return what ``--formats`` lists as :func:`qpaged.sweep.sweep_order` does, or what ``default`` lists.

    Raises:
        BadArgumentError: a format that is not there; the message says which.
    """
    given = default if args.formats is None else args.formats
    spellings = split_formats(given)
    if EVERYTHING in spellings:
        raise BadArgumentError(
            "formats", "must list formats, as int8,int4; all stands alone, and for qpaged sweep only."
        )
    if "" in spellings:
        raise BadArgumentError("formats", f"has an empty name in {given!r}; part names by one comma.")
    try:
        return sweep.sweep_order(spellings)
    except OSError as error:  # whose strerror holds the library's advice, too
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise BadArgumentError(
            "formats",
            f"{error.filename} cannot be read ({reason}); give a file that qpaged tune wrote, or a format "
            f"such as int8.",
        ) from error
    except ValueError as error:
        raise BadArgumentError("formats", f"cannot be used: {error}") from error


def check_layers(formats: Sequence[tuple[str, CacheFormat]], layers: int) -> None:
    """Raise BadArgumentError if a format is given for a layer that the model does not have."""
    for name, cache_format in formats:
        for layer, _ in cache_format.layers:
            if layer >= layers:
                raise BadArgumentError(
                    "formats",
                    f"{name} names layer {layer}, but the model has layers 0 to {layers - 1}; give a file "
                    f"that was made for this model.",
                )


def split_formats(spellings: str) -> list[str]:
    """Split a list of formats at its commas."""
    return [spelling.strip() for spelling in spellings.split(",")]
