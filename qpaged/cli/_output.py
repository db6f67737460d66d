"""Exit statuses, and messages on stderr."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

FINE, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130

Subparsers = argparse._SubParsersAction
"""What :meth:`argparse.ArgumentParser.add_subparsers` returns."""


def say(args: argparse.Namespace, message: str) -> None:
    """Print one line on stderr, after the command's name."""
    print(f"qpaged {args.command}: {' '.join(message.split())}", file=sys.stderr)


FILES = "results.json", "report.html"


def make_writable(directory: Path, option: str) -> None:
    """Make a directory for results.

    Raises:
        ValueError: the directory cannot be made, or nothing can be written to it.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"{option} {directory} cannot be made ({error.strerror}); give a directory."
        ) from error
    if not os.access(directory, os.W_OK):
        raise ValueError(f"{option} {directory} cannot be written to; give another directory.")
    for name in FILES:
        if (directory / name).is_dir():
            raise ValueError(
                f"{option} {directory} has a directory {name}, where a file is to go; give another directory."
            )


def print_columns(head: Sequence[str], rows: Sequence[Sequence[str]], align: str) -> None:
    """Print a table with two spaces between columns; ``align`` has ``<`` or ``>`` for each column."""
    widths = [max(len(cell) for cell in column) for column in zip(head, *rows, strict=True)]
    for row in (head, *rows):
        cells = [f"{cell:{side}{width}}" for cell, side, width in zip(row, align, widths, strict=True)]
        print("  ".join(cells).rstrip())
