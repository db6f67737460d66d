"""``qpaged tune``."""

import argparse
from pathlib import Path

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
from qpaged.cli._sweep import publish


def add(commands) -> None:
    parser = commands.add_parser(
        "tune",
        help="find a format for each layer, keys and values apart, within a budget of bits or of KL",
        description="Measure what each format does to the keys and to the values of each layer, choose the "
        "best within the budget, verify the choice on other parts of the text, and write it as JSON, which "
        "init_cache(quantizer=...), adopt and sweep take. A search that was interrupted goes on where it "
        "stopped.",
    )
    add_job(parser)
    parser.add_argument("--bits", type=float, metavar="B", help="bits per element, scales included, at most")
    parser.add_argument(
        "--max-kl", type=float, metavar="KL", help="mean KL to the plain cache, at most, nats a token"
    )
    parser.add_argument(
        "--formats",
        metavar="LIST",
        help=f"what to choose from ({', '.join(sweep.CANDIDATES)}, those that fit)",
    )
    parser.add_argument("--out", metavar="FILE", type=Path, default=Path("format.json"), help="(%(default)s)")
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
    if args.out.suffix != ".json":
        raise ValueError(f"--out must be a file that ends in .json, but came as {args.out}.")
    if args.out.is_dir():
        raise ValueError(f"--out must be a file, but {args.out} is a directory.")
    directory = args.out.with_suffix("") if args.report is None else args.report
    make_writable(args.out.parent, "--out")
    make_writable(directory, "--report")
    if args.formats is not None:
        sweep.sweep_order(split_formats(args.formats))
    model, text, settings = load_job(args)
    formats = (
        sweep.default_candidates(model.head_dim) if args.formats is None else split_formats(args.formats)
    )
    job = sweep.Sweep(model, text, tuple(formats), settings)
    say_if_short(args, job)
    tune = sweep.Tune(job, budget, args.out.name)
    journal = sweep.Journal(
        args.out.with_name(f"{args.out.name}.partial"),
        sweep.same_conditions(sweep.conditions(job)),
        args.fresh,
    )
    try:
        with sweep.progress_bar(tune.tokens, "tune") as report:
            tuned = tune.run(journal, report)
    except sweep.UnattainableError as error:
        say(args, str(error))
        return FAILED
    except KeyboardInterrupt:
        say(args, f"interrupted; {journal.path} keeps what was measured, for a rerun.")
        return INTERRUPTED
    tuned.format.save(args.out)
    result = sweep.SweepResult(job, tuned.runs, tuned.failures, tune=tuned.record)
    status = publish(args, result, directory)
    if not args.json:
        print(f"The format: {args.out}")
    journal.path.unlink(missing_ok=True)
    return status if tuned.failures else FINE
