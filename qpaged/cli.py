"""The command line: ``qpaged sweep`` and ``qpaged formats``.

Exit status: 0 fine, 1 a format failed, 2 wrong usage, 130 interrupted.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import qpaged
from qpaged import sweep
from qpaged.sweep._extras import need_all
from qpaged.sweep._progress import progress_bar
from qpaged.sweep._settings import DTYPES

FINE, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the exit status."""
    parser = _parser()
    args = parser.parse_args(argv)
    try:
        return args.run(args)
    except KeyboardInterrupt:
        print("qpaged: interrupted", file=sys.stderr)
        return INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="qpaged", description=qpaged.__doc__)
    parser.add_argument("--version", action="version", version=f"qpaged {qpaged.__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_sweep(commands)
    formats = commands.add_parser("formats", help="list the installed formats", description="List the installed formats.")
    formats.set_defaults(run=_formats)
    return parser


def _add_sweep(commands) -> None:
    defaults = sweep.Settings()
    parser = commands.add_parser(
        "sweep",
        help="measure formats on a model and a text: accuracy against memory",
        description="Run a model over a text with a plain cache and with each format; print a table, and write "
        "results.json and frontier.png.",
    )
    add = parser.add_argument
    add("model", nargs="?", metavar="MODEL_DIR", help="a byte-level Llama checkpoint (default: the bundled one)")
    add("--text", metavar="FILE", help="what to predict (default: held-out files of Python's standard library)")
    add("--formats", metavar="LIST", help="as int8,int8:token/fp8_e4m3 (keys/values); default: all installed")
    add("--tokens", type=int, metavar="N", help=f"bytes to predict, at most (default: {defaults.tokens})")
    add("--context", type=int, metavar="N", help="bytes of a sequence (default: 1024, or what the model was made for)")
    add("--page-size", type=int, metavar="N", default=defaults.page_size, help="tokens of a page (default: %(default)s)")
    add("--dtype", choices=DTYPES, default=defaults.dtype, help="the caches' logical dtype (default: %(default)s)")
    add("--out", metavar="DIR", type=Path, default=Path(), help="where the files go (default: here)")
    add("--json", action="store_true", help="print results.json instead of the table")
    parser.set_defaults(run=_sweep)


def _sweep(args: argparse.Namespace) -> int:
    try:
        need_all()
        formats, broken = _asked(args.formats)
        sweep.sweep_order(formats)
        model, text = sweep.load_model(args.model), sweep.load_text(args.text)
        settings = _settings(args, model)
        outcomes = sweep.iter_sweep(model, text, formats, settings, lambda *a: report(*a))
        args.out.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError, ImportError) as error:
        print(f"qpaged sweep: {error}", file=sys.stderr)
        return USAGE
    done: list = [sweep.Failure(name, error) for name, error in broken.items()]
    complete = True
    total = len(sweep.sweep_order(formats)) * len(text.sequences(settings)) * settings.context
    try:
        with progress_bar(total) as report:
            done.extend(outcomes)
    except KeyboardInterrupt:
        complete = False
    runs = tuple(item for item in done if isinstance(item, sweep.Run))
    failures = tuple(item for item in done if isinstance(item, sweep.Failure))
    result = sweep.SweepResult(model, text, settings, runs, failures, complete)
    if args.json:
        print(result.to_json(), end="")
    else:
        sweep.print_table(result)
    sweep.write_json(result, args.out)
    sweep.write_figure(result, args.out)
    return INTERRUPTED if not complete else FAILED if failures else FINE


def _settings(args, model) -> sweep.Settings:
    context = args.context or min(1024, model.config.max_position_embeddings)
    tokens = args.tokens or sweep.Settings.tokens
    return sweep.Settings(tokens=tokens, context=context, page_size=args.page_size, dtype=args.dtype)


def _asked(formats: str | None) -> tuple[list[str], dict[str, str]]:
    if formats is not None:
        return [part.strip() for part in formats.split(",")], {}
    infos, broken = sweep.installed_formats()
    return [info.spelling for info in infos], broken


def _formats(args: argparse.Namespace) -> int:
    infos, broken = sweep.installed_formats()
    width = max([len(info.spelling) for info in infos], default=0)
    for info in infos:
        print(f"{info.spelling:{width}}  {info.granularity:8}  {info.bits_per_element:6.3f}  {info.summary}")
    for name, error in broken.items():
        print(f"qpaged formats: {name}: {error}", file=sys.stderr)
    return FAILED if broken else FINE


if __name__ == "__main__":
    raise SystemExit(main())
