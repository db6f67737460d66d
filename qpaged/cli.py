"""The command line: ``qpaged sweep`` and ``qpaged formats``.

Exit status: 0 fine, 1 a format failed, 2 wrong usage, 130 interrupted.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import qpaged
from qpaged import sweep

EVERYTHING = "all"
FINE, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command, and return the exit status."""
    args = _parser().parse_args(argv)
    try:
        return args.run(args)
    except KeyboardInterrupt:
        _say(args, "interrupted; nothing was finished.")
        return INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="qpaged", description=qpaged.__doc__)
    parser.add_argument("--version", action="version", version=f"qpaged {qpaged.__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", dest="command", required=True)
    _add_sweep(commands)
    summary = "list the installed formats, their bits per element and what they do"
    formats = commands.add_parser("formats", help=summary, description=f"{summary}.".capitalize())
    formats.set_defaults(run=_formats)
    return parser


def _add_sweep(commands) -> None:
    default = sweep.Settings()
    parser = commands.add_parser(
        "sweep",
        help="measure formats on a model and a text: accuracy against memory",
        description="Run a model over a text with a plain cache and with each format; print a table, and "
        "write results.json and frontier.png.",
    )
    add = parser.add_argument
    add("model", nargs="?", metavar="MODEL_DIR", help="a byte-level Llama checkpoint (the bundled one)")
    add("--text", metavar="FILE", help="what to predict (held-out files of Python's own library)")
    add(
        "--formats",
        metavar="LIST",
        help="such as int8,int8:token/int4+rotate; all, for every wrapper too (all bare)",
    )
    add("--tokens", type=int, metavar="N", default=default.tokens, help="bytes to predict (%(default)s)")
    add("--context", type=int, metavar="N", help=f"bytes of a sequence (up to {default.context})")
    add("--page-size", type=int, metavar="N", default=default.page_size, help="tokens a page (%(default)s)")
    add("--dtype", choices=sweep.DTYPES, default=default.dtype, help="caches' logical dtype (%(default)s)")
    add("--out", metavar="DIR", type=Path, default=Path(), help="where the two files go (here)")
    add("--json", action="store_true", help="print the JSON instead of the table")
    parser.set_defaults(run=_sweep)


def _sweep(args: argparse.Namespace) -> int:
    try:
        sweep.need_sweep_extra()
        job, failures, unfit = _job(args)
        _make_writable(args.out)
    except (OSError, ValueError, ImportError) as error:
        _say(args, str(error))
        return USAGE
    if unfit:
        head_dim = job.model.config.head_dim
        _say(args, f"left out, since they do not go with head_dim {head_dim}: {', '.join(unfit)}.")
    if job.tokens < args.tokens // job.settings.context * job.settings.context:
        _say(args, f"{job.text.source} is enough for {job.tokens:,} tokens only.")
    result = _run(job, failures)
    if not result.runs:
        raise KeyboardInterrupt
    return _publish(args, result)


def _job(args: argparse.Namespace) -> tuple[sweep.Sweep, list[sweep.Failure], list[str]]:
    """What is to be run; and, where all installed formats are asked for, those that cannot even be loaded and
    those that do not go with the model."""
    failures: list[sweep.Failure] = []
    unfit: list[str] = []
    if args.formats not in (None, EVERYTHING):
        formats = [part.strip() for part in args.formats.split(",")]
        sweep.sweep_order(formats)
    model = sweep.load_model(args.model)
    if args.formats in (None, EVERYTHING):
        formats, failures, unfit = _installed(args.formats == EVERYTHING, model.config.head_dim)
    context = args.context
    if context is None:
        context = min(sweep.Settings().context, model.config.max_position_embeddings)
    settings = sweep.Settings(tokens=args.tokens, context=context, page_size=args.page_size, dtype=args.dtype)
    return sweep.Sweep(model, sweep.load_text(args.text), tuple(formats), settings), failures, unfit


def _installed(wrapped: bool, head_dim: int) -> tuple[list[str], list[sweep.Failure], list[str]]:
    """The installed formats that go with the model, those that are broken, and those that do not go."""
    infos, broken = sweep.installed_formats()
    formats = list(qpaged.available_formats(wrapped=True)) if wrapped else [info.spelling for info in infos]
    fit, reasons = sweep.fitting(formats, head_dim)
    return fit, [sweep.Failure(name, error) for name, error in broken.items()], list(reasons)


def _make_writable(directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    if not os.access(directory, os.W_OK):
        raise PermissionError(f"--out {directory} cannot be written to; give another directory.")


def _run(job: sweep.Sweep, failures: list[sweep.Failure]) -> sweep.SweepResult:
    """Everything, or what was finished when the user interrupted."""
    runs: list[sweep.Run] = []
    complete = False
    try:
        with sweep.progress_bar(job.tokens * len(job.order)) as report:
            for outcome in job.run(report):
                (runs if isinstance(outcome, sweep.Run) else failures).append(outcome)  # type: ignore[arg-type]
        complete = True
    except KeyboardInterrupt:
        pass
    return sweep.SweepResult(job.model, job.text, job.settings, tuple(runs), tuple(failures), complete)


def _publish(args: argparse.Namespace, result: sweep.SweepResult) -> int:
    """Write the files, and print."""
    sweep.write_json(result, args.out)
    sweep.write_figure(result, args.out)
    if args.json:
        print(result.to_json(), end="")
    else:
        sweep.print_table(result)
    for failure in result.failures:
        _say(args, f"{failure.format} failed: {failure.error}")
    if not result.complete:
        _say(args, f"interrupted; finished: {', '.join(run.format for run in result.runs)}.")
        return INTERRUPTED
    return FAILED if result.failures else FINE


def _formats(args: argparse.Namespace) -> int:
    infos, broken = sweep.installed_formats()
    rows = [(info.spelling, info.granularity, f"{info.bits_per_element:.3f}", info.summary) for info in infos]
    head = ("format", "scales per", "bits", "what it does")
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    for name, granularity, bits, summary in (head, *rows):
        print(f"{name:{widths[0]}}  {granularity:{widths[1]}}  {bits:>{widths[2]}}  {summary}".rstrip())
    print("\nbits: per element, scales included, for pages of 16 tokens, head_dim 128, logical bfloat16.")
    print("Keys and values apart: KEYS/VALUES, as int8:channel/int8:token. Without quantization: plain.")
    print(
        f"Wrappers, after any format that they go with: {', '.join(qpaged.available_wrappers()) or 'none'}."
    )
    for name, error in broken.items():
        _say(args, f"{name}: {error}")
    return FAILED if broken else FINE


def _say(args: argparse.Namespace, message: str) -> None:
    print(f"qpaged {args.command}: {' '.join(message.split())}", file=sys.stderr)


if __name__ == "__main__":
    raise SystemExit(main())
