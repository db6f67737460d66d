"""Exit statuses, and messages on stderr."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from qpaged._bad_argument import BadArgumentError

FINE, FAILED, USAGE, INTERRUPTED, CLOSED = 0, 1, 2, 130, 141

Subparsers = argparse._SubParsersAction
"""What :meth:`argparse.ArgumentParser.add_subparsers` returns."""


def say(args: argparse.Namespace, message: str) -> None:
    """Print one line on stderr, after the command's name."""
    name = f"qpaged {args.command}".strip()
    print(f"{name}: {' '.join(message.split())}", file=sys.stderr)


def keep_flags(parser: argparse.ArgumentParser) -> None:
    """Make the parser's ``args.flags`` say which flag gives each argument, for :func:`in_words_of_flags`."""
    actions = [action for action in parser._actions if action.option_strings]
    parser.set_defaults(flags={action.dest: action.option_strings[-1] for action in actions})


def in_words_of_flags(args: argparse.Namespace, error: Exception) -> str:
    """Return an error's message, with the flag that was typed where it names the library's argument.

    A flag gives the argument that its ``dest`` names.
    """
    if isinstance(error, BadArgumentError):
        return f"{args.flags.get(error.argument, error.argument)} {error.rule}"
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename} cannot be used ({error.strerror})."
    return str(error)


FILES = "results.json", "report.html"


def make_writable(directory: Path, option: str) -> None:
    """Make a directory for results, which ``option``, a flag and its value, asks for.

    Raises:
        ValueError: the directory cannot be made, or nothing can be written to it.
    """
    for path in (directory, *directory.parents):
        if path.exists() and not path.is_dir():
            raise ValueError(f"{option} cannot be written: {path} is a file, not a directory.")
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{option} cannot be written ({error.strerror}); give another place.") from error
    if not os.access(directory, os.W_OK):
        raise ValueError(f"{option} cannot be written to; give another place.")
    for name in FILES:
        if (directory / name).is_dir():
            raise ValueError(
                f"{option} cannot be written: {directory} has a directory {name}, where a file is to go."
            )


def print_columns(head: Sequence[str], rows: Sequence[Sequence[str]], align: str) -> None:
    """Print a table with two spaces between columns; ``align`` has ``<`` or ``>`` for each column."""
    widths = [max(len(cell) for cell in column) for column in zip(head, *rows, strict=True)]
    for row in (head, *rows):
        cells = [f"{cell:{side}{width}}" for cell, side, width in zip(row, align, widths, strict=True)]
        print("  ".join(cells).rstrip())
