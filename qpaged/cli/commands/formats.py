"""``qpaged formats``: lists the installed formats."""

import argparse

import qpaged
from qpaged import sweep
from qpaged.cli._output import FAILED, FINE, Subparsers, print_columns, say


def add(subparsers: Subparsers) -> None:
    summary = "list the installed formats, their bits per element and what they do"
    parser = subparsers.add_parser("formats", help=summary, description=f"{summary}.".capitalize())
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    infos, broken = sweep.installed_formats()
    head = ("format", "scales per", "bits", "what it does")
    rows = [(info.spelling, info.granularity, f"{info.bits_per_element:.3f}", info.summary) for info in infos]
    print_columns(head, rows, "<<><")
    print("\nbits: per element, scales included, for pages of 16 tokens, head_dim 128, logical bfloat16.")
    print("Keys and values apart: KEYS/VALUES, as int8:channel/int8:token. Without quantization: plain.")
    exact_alone = [info.spelling for info in infos if qpaged.get_quantizer(info.spelling).needs_exact_pages]
    if exact_alone:
        print(f"With exact pages alone, as {exact_alone[0]}+exact128: {', '.join(exact_alone)}.")
    wrappers = ", ".join(qpaged.available_wrappers()) or "none"
    print(f"Wrappers, after any format that they go with: {wrappers}.")
    for name, error in broken.items():
        say(args, f"{name}: {error}")
    return FAILED if broken else FINE
