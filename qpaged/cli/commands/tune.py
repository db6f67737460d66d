"""``qpaged tune``: finds a format for each layer."""

import argparse
import dataclasses
import json
from pathlib import Path

from qpaged import sweep
from qpaged._files import write_whole
from qpaged.cli._arguments import number
from qpaged.cli._formats import named_formats, split_formats
from qpaged.cli._job import add_job, load_job, say_job
from qpaged.cli._output import (
    FAILED,
    FINE,
    INTERRUPTED,
    Subparsers,
    in_words_of_flags,
    make_writable,
    say,
)
from qpaged.cli._publish import publish


def add(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser(
        "tune",
        help="find a format for each layer, keys and values apart, within a budget of bits or of KL",
        description="Measure what each format does to the keys and to the values of each layer, choose the "
        "best within the budget, verify the choice on other parts of the text, and write it as JSON, which "
        "init_cache(quantizer=...), adopt and sweep take. A search that was interrupted goes on where it "
        "stopped.",
    )
    add_job(parser)
    parser.add_argument("--bits", type=number, metavar="B", help="bits per element, scales included, at most")
    parser.add_argument(
        "--max-kl", type=number, metavar="KL", help="mean KL to the plain cache, at most, nats a token"
    )
    parser.add_argument(
        "--formats",
        metavar="LIST",
        help=f"what to choose from ({', '.join(sweep.CANDIDATES)}, those that fit)",
    )
    parser.add_argument("--out", metavar="FILE", type=Path, default=Path("format.json"), help="(%(default)s)")
    parser.add_argument(
        "--export",
        choices=sorted(sweep.EXPORTS),
        help="write the choice as that engine reads it, too, beside FILE; it must have such formats",
    )
    parser.add_argument(
        "--report",
        metavar="DIR",
        type=Path,
        help="where results.json, report.html and figures go (FILE without .json)",
    )
    parser.add_argument("--fresh", action="store_true", help="forget what an interrupted search has measured")
    parser.add_argument("--json", action="store_true", help="print the JSON instead of the table")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    sweep.need_sweep_extra()
    budget = sweep.Budget(args.bits, args.max_kl)
    directory = _output_directory(args)
    with sweep.claimed(args.out), sweep.claimed(directory, "--report"):
        return _tune(args, budget, directory)


def _tune(args: argparse.Namespace, budget: sweep.Budget, directory: Path) -> int:
    if args.formats is not None:
        # Raise for bad spellings now, before the model is loaded.
        named_formats(args)
    model, text, settings = load_job(args)
    if args.formats is None:
        formats = sweep.default_candidates(model.head_dim)
    else:
        formats = split_formats(args.formats)
    settings = dataclasses.replace(settings, noise=False)  # a choice has no use for it
    job = sweep.Sweep(model, text, tuple(formats), settings)
    tune = sweep.Tune(job, budget, args.out.name)
    candidates = f"{len(tune.candidates)} candidates for keys and values of {tune.layers} layers"
    say_job(
        args, job, f"{candidates}, {job.tokens:,} tokens", f"{args.out.resolve()} and {directory.resolve()}"
    )
    journal = sweep.Journal(
        args.out.with_name(f"{args.out.name}.partial"),
        sweep.same_conditions(sweep.conditions(job)),
        args.fresh,
    )
    try:
        with sweep.progress_bar(tune.tokens, "tune") as progress:
            tuned = tune.run(journal, progress)
    except sweep.UnattainableError as error:
        say(args, in_words_of_flags(args, error))
        return FAILED
    except KeyboardInterrupt:
        say(args, f"interrupted; {journal.path} keeps what was measured, for a rerun.")
        return INTERRUPTED
    tuned.format.save(args.out)
    exported = _export(args, tuned)
    max_kl = sweep.MAX_KL if args.max_kl is None else args.max_kl
    result = sweep.SweepResult(job, tuned.runs, tuned.failures, tune=tuned.record, max_kl=max_kl)
    status = publish(args, result, directory)
    if not args.json:
        print(f"The format: {args.out}")
    journal.path.unlink(missing_ok=True)
    if not exported:
        return FAILED
    return status if tuned.failures else FINE


def _export(args: argparse.Namespace, tuned: sweep.Tuned) -> bool:
    """Write the choice for the engine that was named, if any; return False if it has no such formats."""
    if args.export is None:
        return True
    path = args.out.with_suffix(f".{args.export}.json")
    try:
        record = sweep.EXPORTS[args.export](tuned.record["layers"])
    except ValueError as error:
        say(args, str(error))
        return False
    write_whole(path, json.dumps(record, indent=2) + "\n")
    say(args, f"{path} has the choice as {args.export} reads it.")
    return True


def _output_directory(args: argparse.Namespace) -> Path:
    """Check --out and --report, and return the directory of the report.

    Raises:
        ValueError: --out is no JSON file, or nothing can be written there.
    """
    if args.out.suffix != ".json":
        raise ValueError(
            f"--out must name a file that ends in .json, as format.json, but came as {str(args.out)!r}."
        )
    if args.out.is_dir():
        raise ValueError(f"--out must be a file, but {args.out} is a directory.")
    directory = args.report
    if directory is None:
        directory = args.out.with_suffix("")
    make_writable(args.out.parent, f"--out {args.out}")
    make_writable(directory, f"--report {directory}")
    return directory
