"""Writes and prints the results of ``sweep`` and ``tune``."""

import argparse
from pathlib import Path

from qpaged import sweep
from qpaged.cli._output import FAILED, FINE, INTERRUPTED, say
from qpaged.sweep._numbers import percent, rough_duration, small


def publish(args: argparse.Namespace, result: sweep.SweepResult, directory: Path) -> int:
    """Write all files of a result, print it, and return the exit status."""
    return publish_results(args, result.to_dict(), directory)


def publish_results(args: argparse.Namespace, results: sweep.Results, directory: Path) -> int:
    """Do so with the values of ``results.json``."""
    sweep.write_record(results, directory)
    sweep.write_figures(results, directory)
    report = sweep.write_report(results, directory)
    if args.json:
        print(sweep.json_of(results), end="")
    else:
        sweep.print_table(results)
        print(f"The report: {report}")
    for failure in results["failures"]:
        say(args, f"{failure['format']} failed: {failure['error']}")
    if not results["complete"]:
        say(args, f"interrupted; finished: {', '.join(run['format'] for run in results['runs'])}.")
        return INTERRUPTED
    return FAILED if results["failures"] else FINE


def say_row(args: argparse.Namespace, run: sweep.Run) -> None:
    """Say what was measured of a format, as soon as it is."""
    top = run.metrics["same_top"]
    assert top is not None  # as every run has it
    say(
        args,
        f"{run.format}: {run.bits_per_element:.2f} bits an element, KL {small(run.kl_mean)}, "
        f"same top-1 {percent(top)}, {rough_duration(run.seconds)}",
    )
    for noise in run.noise or ():
        kl = small(noise["kl_mean"], noise["kl_mean_se"])
        say(args, f"{run.format}, {noise['conditions']}: KL {kl}, the noise of the reference")
