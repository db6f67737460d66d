"""The command line: ``qpaged sweep``, ``tune``, ``plan`` and ``formats``.

Each module in ``commands`` is one command. Exit status: 0 success, 1 a format failed or none is good enough,
2 wrong usage, 130 interrupted.
"""

import argparse
import importlib
import io
import pkgutil
import sys
from collections.abc import Iterator, Sequence
from types import ModuleType

import qpaged
from qpaged.cli import commands
from qpaged.cli._output import INTERRUPTED, USAGE, say


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command, and return the exit status."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A long job must not fail because its output is not ASCII.
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
    subparsers = parser.add_subparsers(metavar="COMMAND", dest="command", required=True)
    for command in _command_modules():
        command.add(subparsers)
    return parser


def _command_modules() -> Iterator[ModuleType]:
    """Yield the modules in ``commands``, whose function ``add`` adds the command's parser."""
    for module in pkgutil.iter_modules(commands.__path__):
        yield importlib.import_module(f"{commands.__name__}.{module.name}")
