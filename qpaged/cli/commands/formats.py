"""``qpaged formats``."""

import argparse

import qpaged
from qpaged import sweep
from qpaged.cli._common import FAILED, FINE, say


def add(commands) -> None:
    summary = "list the installed formats, their bits per element and what they do"
    parser = commands.add_parser("formats", help=summary, description=f"{summary}.".capitalize())
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
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
        say(args, f"{name}: {error}")
    return FAILED if broken else FINE
