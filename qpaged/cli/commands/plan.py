"""``qpaged plan``: shows how many tokens fit into a memory in each format."""

import argparse
import dataclasses
import json
import math
import re
from typing import Any

from qpaged import sweep
from qpaged._bad_argument import BadArgumentError
from qpaged.cli._arguments import number, token_count, whole_number
from qpaged.cli._devices import mesh_axes
from qpaged.cli._formats import check_layers, named_formats
from qpaged.cli._output import FAILED, FINE, Subparsers, in_words_of_flags, print_columns, say
from qpaged.models import CacheSizes, read_cache_sizes, weights_bytes
from qpaged.plan import Plan, device_memory, plan, readable_bytes

BINARY_UNITS = {"": 1, "b": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}
BINARY_UNITS |= {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}
DECIMAL_UNITS = {"kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
UNITS = BINARY_UNITS | DECIMAL_UNITS
LEAST_MEMORY = 2**16  # bytes; no device has less
DEFAULT_FORMATS = "plain,int8,int8:token+rotate,int6:token+rotate,int4:token+rotate"
DERIVED = ("cache", "unused", "pages", "tokens", "sequences", "bytes_per_token")


def size(text: str) -> int:
    """Return the bytes of ``"80GiB"``, ``"80GB"`` or a plain number; ``"80G"`` is 80GiB."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", text.strip().lower())
    count = math.inf
    if match is not None and match[2] in UNITS:
        count = float(match[1]) * UNITS[match[2]]
    if count == math.inf:  # also of a number with more digits than a float has room for
        raise argparse.ArgumentTypeError(
            f"{text!r:.60} is no size; 80GiB, 141GB or the digits of its bytes are."
        )
    return int(count)


def memory_size(text: str) -> int:
    """Return a device's memory in bytes; a small number without a unit was meant to have one."""
    memory = size(text)
    has_unit = text.strip()[-1].isalpha()
    if not has_unit and 0 < float(text) < LEAST_MEMORY:
        raise argparse.ArgumentTypeError(f"{text!r} would be {text} bytes; write {text}GiB.")
    return memory


def add(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser(
        "plan",
        help="how many tokens and sequences fit into a memory, in each format",
        description="From a model's configuration and a device's memory: the pages, tokens and sequences "
        "that fit in each format, as allocating them gives, and where the memory goes.",
    )
    add_argument = parser.add_argument
    add_argument(
        "model", metavar="MODEL", help="a Hugging Face checkpoint's directory, or its config.json alone"
    )
    add_argument(
        "--memory",
        dest="memory_bytes",
        type=memory_size,
        metavar="SIZE",
        help="of one device, as 80GiB (what the device found has)",
    )
    add_argument(
        "--context", type=token_count, metavar="N", help="tokens of a sequence, as 32k (the model's longest)"
    )
    add_argument("--formats", metavar="LIST", help=f"({DEFAULT_FORMATS}, those that fit)")
    add_argument(
        "--weights",
        dest="weights_bytes",
        type=size,
        metavar="SIZE",
        help="of the whole model (its files', or computed without any)",
    )
    add_argument(
        "--mesh",
        type=mesh_axes,
        metavar="AXES",
        default=(1, 1),
        help="devices that the model is divided over, as 8 or tp=8, and groups of them with sequences of "
        "their own, as dp=32,tp=8 (one device)",
    )
    add_argument(
        "--page-size", type=whole_number, metavar="N", default=16, help="tokens a page (%(default)s)"
    )
    add_argument(
        "--dtype", choices=sweep.DTYPES, default="bfloat16", help="caches' logical dtype (%(default)s)"
    )
    add_argument(
        "--utilization", dest="hbm_utilization", type=number, metavar="U", default=0.9,
        help="share for the cache of what the weights leave (%(default)s)",
    )  # fmt: skip
    add_argument("--json", action="store_true", help="print the JSON instead of the table")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    config = read_cache_sizes(args.model)
    weights, source = args.weights_bytes, ""
    if weights is None:
        weights, origin = weights_bytes(args.model)
        source = f" ({origin})"
    plans, errors = _plans(args, config, weights)
    if not plans:
        raise next(iter(errors.values()))
    for spelling, error in errors.items():
        say(args, f"{spelling} is left out: {in_words_of_flags(args, error)}")
    if args.json:
        print(json.dumps({"plans": [_record(each) for each in plans]}, indent=2))
    else:
        _print_model(args, config, plans[0], source)
        _print_table(plans)
    # Defaults that do not fit the model are no failure; formats that the user typed are.
    return FAILED if errors and args.formats else FINE


def _plans(
    args: argparse.Namespace, config: CacheSizes, weights: int
) -> tuple[list[Plan], dict[str, ValueError]]:
    """Return the plan of each format, and the errors of those that do not fit."""
    formats = named_formats(args, DEFAULT_FORMATS)
    check_layers(formats, config.num_hidden_layers)
    memory = args.memory_bytes
    if memory is None:
        memory = device_memory()
    if memory is None:
        raise BadArgumentError(
            "memory_bytes", "is needed, since the device here does not report its memory; give it, as 80GiB."
        )
    context = args.context
    if context is None:
        context = config.max_position_embeddings
    plans: list[Plan] = []
    errors: dict[str, ValueError] = {}
    for spelling, cache_format in formats:
        try:
            plans.append(
                plan(
                    config, cache_format, memory_bytes=memory, context=context, weights_bytes=weights,
                    dtype=args.dtype, page_size=args.page_size, mesh_size=args.mesh[1], groups=args.mesh[0],
                    hbm_utilization=args.hbm_utilization, name=spelling,
                )
            )  # fmt: skip
        except ValueError as error:
            errors[spelling] = error
    return plans, errors


def _record(each: Plan) -> dict[str, Any]:
    """Return a plan as JSON."""
    names = [field.name for field in dataclasses.fields(each) if field.name != "metadata"]
    return {name: getattr(each, name) for name in (*names, *DERIVED)}


def _print_model(args: argparse.Namespace, config: CacheSizes, first: Plan, source: str) -> None:
    layers, heads = config.num_hidden_layers, config.num_key_value_heads
    print(f"{layers} layers of {heads} KV heads of {config.head_dim}, pages of {args.page_size} tokens.")
    groups, devices = args.mesh
    if groups * devices > 1:
        each = first.metadata.num_kv_heads
        of_groups = f" in {groups} groups, each with sequences of its own" if groups > 1 else ""
        held = f"{each} KV {'head' if each == 1 else 'heads'} on each"
        if devices > 1 and first.shards == 1:
            held = f"all {heads} KV heads on each, since these do not divide by {devices}"
        elif devices > heads:
            held = f"{held}, stored {devices // heads} times"
        print(f"On {groups * devices} devices{of_groups}, {held}. Of one of them, but for sequences:")
    memory, weights, reserve = map(readable_bytes, (first.memory, first.weights, first.reserve))
    print(f"Of {memory} the weights take {weights}{source}, and {reserve} are left to everything else.\n")


def _print_table(plans: list[Plan]) -> None:
    sequences = f"sequences of {plans[0].context:,}"
    head = ("format", "bytes/token", "pages", "tokens", sequences, "codes", "scales", "unused")
    rows = []
    for each in plans:
        rows.append(
            (
                each.format,
                f"{each.bytes_per_token:,.1f}",
                f"{each.pages:,}",
                f"{each.tokens:,}",
                f"{each.sequences:,}",
                readable_bytes(each.key_codes + each.value_codes),
                readable_bytes(each.key_scales + each.value_scales),
                readable_bytes(each.unused),
            )
        )
    print_columns(head, rows, "<>>>>>>>")
    padded = [f"{each.format} {readable_bytes(each.tpu_padding)}" for each in plans if each.tpu_padding]
    if padded:
        print(f"\nMore on TPUs, which pad scales of pages to four KV heads: {', '.join(padded)}.")
