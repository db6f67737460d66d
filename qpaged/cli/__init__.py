"""The command line: ``qpaged sweep``, ``merge``, ``tune``, ``plan``, ``calibrate`` and ``formats``.

Each module in ``commands`` is one command. Exit status: 0 success, 1 a format failed or none is good enough,
2 wrong usage, 130 interrupted, 141 nobody reads the output any more.
"""

import argparse
import importlib
import io
import os
import pkgutil
import sys
from collections.abc import Iterator, Sequence
from types import ModuleType

import qpaged
from qpaged.cli import commands
from qpaged.cli._device import device_trouble
from qpaged.cli._output import CLOSED, INTERRUPTED, USAGE, in_words_of_flags, keep_flags, say


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command, and return the exit status."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A long job must not fail because its output is not ASCII.
            stream.reconfigure(errors="replace")
    args = argparse.Namespace(command="", flags={})
    try:
        _parser().parse_args(argv, args)
        status = args.run(args)
        sys.stdout.flush()  # while a closed pipe can still be told from a mistake
        return status
    except BrokenPipeError:
        # As Python's documentation of SIGPIPE has it: nothing is left to flush when the interpreter ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return CLOSED
    except KeyboardInterrupt:
        say(args, "interrupted; nothing was finished.")
        return INTERRUPTED
    except Exception as error:
        trouble = device_trouble(error)
        if trouble is None and not isinstance(error, OSError | ValueError | ImportError):
            raise
        say(args, trouble or in_words_of_flags(args, error))
        return USAGE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="qpaged", description=qpaged.__doc__)
    parser.add_argument("--version", action="version", version=f"qpaged {qpaged.__version__}")
    subparsers = parser.add_subparsers(metavar="COMMAND", dest="command", required=True)
    for command in _command_modules():
        command.add(subparsers)
    for command_parser in subparsers.choices.values():
        keep_flags(command_parser)
    return parser


def _command_modules() -> Iterator[ModuleType]:
    """Yield the modules in ``commands``, whose function ``add`` adds the command's parser."""
    for module in pkgutil.iter_modules(commands.__path__):
        yield importlib.import_module(f"{commands.__name__}.{module.name}")
