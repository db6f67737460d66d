"""``qpaged sweep``: measures formats on a model and a text."""

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import qpaged
from qpaged import sweep
from qpaged._bad_argument import BadArgumentError
from qpaged._processes import Processes
from qpaged.cli._arguments import number, token_counts
from qpaged.cli._devices import add_processes, as_one_of_all, mesh_of
from qpaged.cli._formats import EVERYTHING, check_layers, named_formats, split_formats
from qpaged.cli._job import add_job, load_job, say_job
from qpaged.cli._output import INTERRUPTED, Subparsers, make_writable, say
from qpaged.cli._publish import publish, say_row
from qpaged.sweep._numbers import rough_duration


def add(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser(
        "sweep",
        help="measure formats on a model and a text: accuracy against memory",
        description="Run a model over a text with a plain cache and with each format; print a table, and "
        "write results.json, report.html and figures. A sweep that was interrupted goes on where it stopped.",
    )
    add_job(parser)
    add_processes(parser)
    parser.add_argument(
        "--formats",
        metavar="LIST",
        help="such as int8,int8:token/int4+rotate,format.json; all, with every wrapper (those worth a look)",
    )
    parser.add_argument("--out", metavar="DIR", type=Path, default=Path(), help="where the files go (here)")
    parser.add_argument(
        "--tasks",
        metavar="FILE",
        action="append",
        default=[],
        help="a multiple-choice task that formats answer, too: a JSON object a line, with query, choices and "
        "gold; may be given several times",
    )
    parser.add_argument(
        "--needles",
        type=token_counts,
        metavar="LENGTHS",
        default=(),
        help="hide numbers in texts of these many tokens, as 1k,4k, and ask each format for them",
    )
    parser.add_argument(
        "--max-kl",
        type=number,
        metavar="KL",
        default=sweep.MAX_KL,
        help="mean KL, nats a token, up to which the verdict takes a format to be good enough (%(default)s)",
    )
    parser.add_argument("--fresh", action="store_true", help="measure again what --out has results of")
    parser.add_argument("--json", action="store_true", help="print the JSON instead of the table")
    parser.set_defaults(run=_run)


@dataclass
class _Formats:
    """The formats to measure, plugins that are broken, and formats that do not fit the model."""

    spellings: list[str]
    failures: list[sweep.Failure] = field(default_factory=list)
    unfit: list[str] = field(default_factory=list)


def _run(args: argparse.Namespace) -> int:
    sweep.need_sweep_extra()
    sweep.check_max_kl(args.max_kl)
    with as_one_of_all(args):
        return _run_here(args)


def _run_here(args: argparse.Namespace) -> int:
    has_no_list = args.formats in (None, EVERYTHING)
    if not has_no_list:
        # Raise for bad spellings now, before the model is loaded.
        named_formats(args)
    make_writable(args.out, f"--out {args.out}")
    with sweep.claimed(args.out):
        return _sweep(args, has_no_list)


def _sweep(args: argparse.Namespace, has_no_list: bool) -> int:
    tasks = _load_tasks(args)
    model, text, settings = load_job(args)
    if has_no_list:
        formats = _unnamed(args.formats == EVERYTHING, model.head_dim)
    else:
        formats = _Formats(split_formats(args.formats))
    job = sweep.Sweep(model, text, tuple(formats.spellings), settings, tasks)
    if model.layers is not None:
        check_layers(job.order, model.layers)
    known = _known_runs(args, job)
    # Or some would wait for others who do not come.
    Processes(mesh_of(args)).agree_on("out", lambda: {"known": sorted(run.identity for run in known)})
    _say_plan(args, job, known, formats)
    result = _measure(args, job, known, formats.failures)
    if not result.runs:
        raise KeyboardInterrupt
    try:
        return publish(args, result, args.out)
    except KeyboardInterrupt:
        say(args, f"interrupted; {args.out / sweep.RESULTS} has all that was measured.")
        return INTERRUPTED


def _load_tasks(args: argparse.Namespace) -> tuple[sweep.Task, ...]:
    if args.tasks and args.step is not None:
        raise BadArgumentError(
            "tasks", "must be left out with --step, which takes as many tokens of each sequence."
        )
    try:
        return tuple(map(sweep.load_task, args.tasks))
    except OSError as error:
        reason = f"{str(error.filename)!r} cannot be read ({error.strerror}); give a file of JSON lines."
        raise BadArgumentError("tasks", reason) from error


def _unnamed(everything: bool, head_dim: int) -> _Formats:
    """Return the formats that are worth a look, or every installed one with every wrapper."""
    _, broken = sweep.installed_formats()
    spellings = sweep.default_formats()
    if everything:
        spellings = list(qpaged.available_formats(wrapped=True))
    fit, unfit = sweep.fitting(spellings, head_dim)
    failures = [sweep.Failure(name, error) for name, error in broken.items()]
    return _Formats(fit, failures, list(unfit))


def _known_runs(args: argparse.Namespace, job: sweep.Sweep) -> Sequence[sweep.Run]:
    """Return the runs in --out that need not be repeated."""
    if args.fresh:
        return ()
    return sweep.known_runs(job, args.out)


def _say_plan(
    args: argparse.Namespace, job: sweep.Sweep, known: Sequence[sweep.Run], formats: _Formats
) -> None:
    """Say what runs, how long that takes if it is known, and where files go; then what is left out."""
    pending = job.pending(known)
    work = "every format is known"
    if pending:
        formats_word = "format" if len(pending) == 1 else "formats"
        work = f"{len(pending)} {formats_word}, {job.tokens:,} tokens each"
    say_job(args, job, work, str(args.out.resolve()))
    results = args.out / sweep.RESULTS
    if known:
        names = ", ".join(run.format for run in known)
        say(args, f"{results} has runs of {names} already.")
        if pending:
            seconds = len(pending) * statistics.median(run.seconds for run in known)
            say(args, f"about {rough_duration(seconds)}, by the time that those took.")
    elif not args.fresh:
        kept = sweep.set_aside(args.out)
        if kept is not None:
            say(args, f"{results} was of another sweep, or damaged, and is kept as {kept.name}.")
    if formats.unfit:
        head_dim, unfit = job.model.head_dim, ", ".join(formats.unfit)
        say(args, f"left out, since they do not go with head_dim {head_dim}: {unfit}.")


def _measure(
    args: argparse.Namespace,
    job: sweep.Sweep,
    known: Sequence[sweep.Run],
    failures: list[sweep.Failure],
) -> sweep.SweepResult:
    """Measure everything, or what is finished when the user interrupts; write results after each format."""
    failures = list(failures)
    runs: list[sweep.Run] = []

    def result(complete: bool) -> sweep.SweepResult:
        identities = {run.identity for run in runs}
        # Runs that this sweep was not asked for, or did not come to yet, stay in the file.
        kept = [run for run in known if run.identity not in identities]
        return sweep.SweepResult(job, (*runs, *kept), tuple(failures), complete, max_kl=args.max_kl)

    total = job.tokens_to_predict(known)
    already = {run.identity for run in known}
    try:
        with sweep.progress_bar(total, "sweep") as progress:
            for outcome in job.run(progress, known):
                if isinstance(outcome, sweep.Run):
                    runs.append(outcome)
                    if outcome.identity not in already:
                        say_row(args, outcome)
                else:
                    failures.append(outcome)
                sweep.write_json(result(complete=False), args.out)
    except KeyboardInterrupt:
        return result(complete=False)
    return result(complete=True)
