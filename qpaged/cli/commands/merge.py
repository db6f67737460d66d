"""``qpaged merge``: puts results together that were measured apart."""

import argparse
from pathlib import Path

from qpaged import sweep
from qpaged.cli._output import Subparsers, make_writable
from qpaged.cli._publish import publish_results


def add(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser(
        "merge",
        help="put the results of several sweeps of one model and text together",
        description="Put results together that were measured apart, as by several machines with some formats "
        "each: one table, one results.json, one report. Model, text, settings and versions must be the same.",
    )
    parser.add_argument(
        "results", nargs="+", metavar="RESULTS", help="directories of sweeps, or their results.json"
    )
    parser.add_argument("--out", metavar="DIR", type=Path, default=Path(), help="where the files go (here)")
    parser.add_argument("--json", action="store_true", help="print the JSON instead of the table")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    sweep.need_sweep_extra()
    merged = sweep.merged([sweep.read_results(path) for path in args.results])
    make_writable(args.out, f"--out {args.out}")
    with sweep.claimed(args.out):
        return publish_results(args, merged, args.out)
