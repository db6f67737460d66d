"""``qpaged sweep``."""

import argparse
from collections.abc import Sequence
from pathlib import Path

import qpaged
from qpaged import sweep
from qpaged.cli._common import (
    FAILED,
    FINE,
    INTERRUPTED,
    add_job,
    load_job,
    make_writable,
    say,
    say_if_short,
    split_formats,
)

EVERYTHING = "all"


def add(commands) -> None:
    parser = commands.add_parser(
        "sweep",
        help="measure formats on a model and a text: accuracy against memory",
        description="Run a model over a text with a plain cache and with each format; print a table, and "
        "write results.json, report.html and figures. A sweep that was interrupted goes on where it stopped.",
    )
    add_job(parser)
    parser.add_argument(
        "--formats",
        metavar="LIST",
        help="such as int8,int8:token/int4+rotate,format.json; all, for every wrapper too (all bare)",
    )
    parser.add_argument("--out", metavar="DIR", type=Path, default=Path(), help="where the files go (here)")
    parser.add_argument("--fresh", action="store_true", help="measure again what --out has results of")
    parser.add_argument("--json", action="store_true", help="print the JSON instead of the table")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    sweep.need_sweep_extra()
    asked = None if args.formats in (None, EVERYTHING) else split_formats(args.formats)
    if asked is not None:
        sweep.sweep_order(asked)
    make_writable(args.out, "--out")
    model, text, settings = load_job(args)
    failures: list[sweep.Failure] = []
    unfit: list[str] = []
    if asked is None:
        asked, failures, unfit = _installed(args.formats == EVERYTHING, model.head_dim)
    job = sweep.Sweep(model, text, tuple(asked), settings)
    say_if_short(args, job)
    if unfit:
        say(args, f"left out, since they do not go with head_dim {model.head_dim}: {', '.join(unfit)}.")
    known = () if args.fresh else sweep.known_runs(job, args.out)
    if known:
        say(args, f"{args.out / sweep.RESULTS} has runs of {', '.join(run.format for run in known)} already.")
    elif not args.fresh and (kept := sweep.set_aside(args.out)) is not None:
        say(args, f"{args.out / sweep.RESULTS} was of another sweep, and is kept as {kept.name}.")
    result = _measure(job, known, failures, args.out)
    if not result.runs:
        raise KeyboardInterrupt
    try:
        return publish(args, result, args.out)
    except KeyboardInterrupt:
        say(args, f"interrupted; {args.out / sweep.RESULTS} has all that was measured.")
        return INTERRUPTED


def _installed(wrapped: bool, head_dim: int) -> tuple[list[str], list[sweep.Failure], list[str]]:
    """The installed formats that go with the model, those that are broken, and those that do not go."""
    infos, broken = sweep.installed_formats()
    formats = list(qpaged.available_formats(wrapped=True)) if wrapped else [info.spelling for info in infos]
    fit, unfit = sweep.fitting(formats, head_dim)
    return fit, [sweep.Failure(name, error) for name, error in broken.items()], list(unfit)


def _measure(
    job: sweep.Sweep, known: Sequence[sweep.Run], failures: list[sweep.Failure], out: Path
) -> sweep.SweepResult:
    """Everything, or what was finished when the user interrupted; results.json holds it after each format."""
    runs: list[sweep.Run] = []

    def result(complete: bool) -> sweep.SweepResult:
        done = {run.identity for run in runs}
        rest = [run for run in known if run.identity not in done]  # lest a rerun lose them
        return sweep.SweepResult(job, (*runs, *rest), tuple(failures), complete)

    try:
        with sweep.progress_bar(job.tokens * len(job.pending(known)), "sweep") as report:
            for outcome in job.run(report, known):
                if isinstance(outcome, sweep.Run):
                    runs.append(outcome)
                else:
                    failures.append(outcome)
                sweep.write_json(result(complete=False), out)
    except KeyboardInterrupt:
        return result(complete=False)
    return result(complete=True)


def publish(args: argparse.Namespace, result: sweep.SweepResult, out: Path) -> int:
    """Write the files, and print."""
    sweep.write_json(result, out)
    results = result.to_dict()
    sweep.write_figures(results, out)
    report = sweep.write_report(results, out)
    if args.json:
        print(result.to_json(), end="")
    else:
        sweep.print_table(results)
        print(f"The report: {report}")
    for failure in result.failures:
        say(args, f"{failure.format} failed: {failure.error}")
    if not result.complete:
        say(args, f"interrupted; finished: {', '.join(run.format for run in result.runs)}.")
        return INTERRUPTED
    return FAILED if result.failures else FINE
