"""``qpaged plan``."""

import argparse
import dataclasses
import json
import re
from typing import Any

from qpaged import sweep
from qpaged.cli._common import FAILED, FINE, say, split_formats
from qpaged.models import DecoderConfig, parameter_bytes, read_config
from qpaged.plan import Plan, device_memory, plan

UNITS = {"": 1, "B": 1} | {
    f"{letter}{suffix}": base**power
    for power, letter in enumerate("KMGT", start=1)
    for suffix, base in (("", 1024), ("iB", 1024), ("B", 1000))
}
FORMATS = "plain,int8,int8:token,int8/int4,int4+rotate"


def size(text: str) -> int:
    """Bytes of ``"80GiB"``, ``"80GB"`` or a plain number; ``"80G"`` is 80GiB."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    if found is None or found[2] not in UNITS:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; 80GiB, 141GB or a number of bytes is.")
    return int(float(found[1]) * UNITS[found[2]])


def add(commands) -> None:
    parser = commands.add_parser(
        "plan",
        help="how many tokens and sequences fit into a memory, in each format",
        description="From a model's configuration and a device's memory: the pages, tokens and sequences "
        "that fit in each format, as allocating them gives, and where the memory goes.",
    )
    argument = parser.add_argument
    argument("model", metavar="MODEL", help="a Hugging Face checkpoint's directory, or its config.json alone")
    argument(
        "--memory", type=size, metavar="SIZE", help="of one device, as 80GiB (what the device found has)"
    )
    argument("--context", type=int, metavar="N", help="tokens of a sequence (the model's longest)")
    argument("--formats", metavar="LIST", help=f"({FORMATS}, those that fit)")
    argument(
        "--weights", type=size, metavar="SIZE", help="of the whole model (the checkpoint's; 0 without one)"
    )
    argument(
        "--mesh",
        type=int,
        metavar="N",
        default=1,
        help="devices that the model is divided over (%(default)s)",
    )
    argument("--page-size", type=int, metavar="N", default=16, help="tokens a page (%(default)s)")
    argument("--dtype", choices=sweep.DTYPES, default="bfloat16", help="caches' logical dtype (%(default)s)")
    argument(
        "--utilization", type=float, metavar="U", default=0.9,
        help="share for the cache of what the weights leave (%(default)s)",
    )  # fmt: skip
    argument("--json", action="store_true", help="print the JSON instead of the table")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    config = read_config(args.model)
    weights = args.weights
    if weights is None:
        weights = parameter_bytes(args.model) or 0
    memory = device_memory() if args.memory is None else args.memory
    if memory is None:
        raise ValueError("the device found does not tell its memory; give it, as in --memory 80GiB.")
    if args.mesh < 1:
        raise ValueError(f"--mesh must be at least 1, but came as {args.mesh}.")
    context = config.max_position_embeddings if args.context is None else args.context
    plans: list[Plan] = []
    errors: dict[str, ValueError] = {}
    for spelling, format in sweep.sweep_order(split_formats(args.formats or FORMATS)):
        try:
            plans.append(
                plan(
                    config, format, memory_bytes=memory, context=context, weights_bytes=weights,
                    dtype=args.dtype, page_size=args.page_size, mesh_size=args.mesh,
                    hbm_utilization=args.utilization, name=spelling,
                )
            )  # fmt: skip
        except ValueError as error:
            errors[spelling] = error
    if not plans:
        raise next(iter(errors.values()))
    for spelling, reason in errors.items():
        say(args, f"{spelling} is left out: {reason}")
    if args.json:
        print(json.dumps({"plans": [_record(each) for each in plans]}, indent=2))
    else:
        _print(args, config, plans)
    return FAILED if errors and args.formats else FINE


def _record(each: Plan) -> dict[str, Any]:
    """A plan as JSON."""
    fields = {
        field.name: getattr(each, field.name)
        for field in dataclasses.fields(each)
        if field.name != "metadata"
    }
    derived = ("cache", "unused", "pages", "tokens", "sequences", "bytes_per_token")
    return fields | {name: getattr(each, name) for name in derived}


def _print(args: argparse.Namespace, config: DecoderConfig, plans: list[Plan]) -> None:
    first, layers, heads = plans[0], config.num_hidden_layers, config.num_key_value_heads
    print(f"{layers} layers of {heads} KV heads of {config.head_dim}, pages of {args.page_size} tokens.")
    if args.mesh > 1 and first.shards > 1:
        print(f"On {args.mesh} devices, {heads // first.shards} KV heads on each. Of one of them:")
    elif args.mesh > 1:
        print(
            f"On {args.mesh} devices: {heads} KV heads do not divide by that, so each holds all of them. "
            f"Of one of them:"
        )
    print(
        f"Of {_gib(first.memory)} the weights take {_gib(first.weights)}, and {_gib(first.reserve)} are "
        f"left to everything else.\n"
    )
    head = (
        "format",
        "bytes/token",
        "pages",
        "tokens",
        f"sequences of {first.context:,}",
        "codes",
        "scales",
        "unused",
    )
    rows = [
        (
            each.format,
            f"{each.bytes_per_token:,.1f}",
            *(f"{count:,}" for count in (each.pages, each.tokens, each.sequences)),
            _gib(each.key_codes + each.value_codes),
            _gib(each.key_scales + each.value_scales),
            _gib(each.unused),
        )
        for each in plans
    ]
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    for name, *numbers in (head, *rows):
        cells = (f"{number:>{width}}" for number, width in zip(numbers, widths[1:], strict=True))
        print(f"{name:{widths[0]}}  {'  '.join(cells)}")


def _gib(count: int) -> str:
    """Bytes, to read."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= scale:
            return f"{count / scale:,.2f} {unit}"
    return f"{count:,} B"
