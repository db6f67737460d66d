"""The command line: ``qpaged sweep``, ``tune``, ``plan`` and ``formats``.

Exit status: 0 fine, 1 a format failed or none is good enough, 2 wrong usage, 130 interrupted.
"""

import argparse
import io
import sys
from collections.abc import Sequence

import qpaged
from qpaged.cli import _formats, _plan, _sweep, _tune
from qpaged.cli._common import INTERRUPTED, USAGE, say


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command, and return the exit status."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # lest a long job fail on printing an umlaut in ASCII
            stream.reconfigure(errors="replace")
    args = _parser().parse_args(argv)
    try:
        return args.run(args)
    except (OSError, ValueError, ImportError) as error:
        say(args, str(error))
        return USAGE
    except KeyboardInterrupt:
        say(args, "interrupted; nothing was finished.")
        return INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="qpaged", description=qpaged.__doc__)
    parser.add_argument("--version", action="version", version=f"qpaged {qpaged.__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", dest="command", required=True)
    for command in (_sweep, _tune, _plan, _formats):
        command.add(commands)
    return parser
