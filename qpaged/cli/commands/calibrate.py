"""``qpaged calibrate``: chooses static scales."""

import argparse
from pathlib import Path

import numpy as np

from qpaged import CacheFormat, CacheScales, sweep
from qpaged._bad_argument import BadArgumentError
from qpaged.cli._devices import add_devices
from qpaged.cli._job import add_checkpoint, add_text, load_checkpoint_job
from qpaged.cli._output import FINE, Subparsers, make_writable, print_columns, say
from qpaged.models import write_scales
from qpaged.models.scales import check_scales_file
from qpaged.sweep._calibrate import DEFAULT, chosen_for

SUFFIXES = ".json", ".safetensors"


def add(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser(
        "calibrate",
        help="choose the static scales of formats such as fp8_e4m3:tensor",
        description="Run a model over a text with a plain cache, and write the scales under which none of "
        "its keys and values saturates: as JSON, which sweep and tune take as --scales and "
        "qpaged.CacheScales.load reads, or as the k_scale and v_scale tensors of checkpoints.",
    )
    add_checkpoint(parser)
    add_devices(parser)
    add_text(parser)
    parser.add_argument(
        "--format",
        metavar="FORMAT",
        default=DEFAULT,
        help="with static scales; those of heads serve a tensor, too (%(default)s)",
    )
    parser.add_argument(
        "--out",
        metavar="FILE",
        type=Path,
        default=Path("scales.json"),
        help="a .json or .safetensors file (%(default)s)",
    )
    settings = sweep.Settings()
    parser.set_defaults(run=_run, batch=1, page_size=settings.page_size, dtype="float32", scales=None)


def _run(args: argparse.Namespace) -> int:
    sweep.need_sweep_extra()
    if args.out.suffix not in SUFFIXES:
        raise BadArgumentError(
            "out", f"must name a file that ends in {' or '.join(SUFFIXES)}, but came as {str(args.out)!r}."
        )
    make_writable(args.out.parent, f"--out {args.out}")
    if args.out.is_dir():
        raise BadArgumentError("out", f"must name a file, but {str(args.out)!r} is a directory.")
    cache_format = _static_format(args.format)
    try:
        check_scales_file(args.out, chosen_for(cache_format))
    except ValueError as error:
        raise BadArgumentError("out", f"cannot hold the scales of {args.format}: {error}") from error
    model, text, settings = load_checkpoint_job(args)
    tokens = settings.tokens // settings.context * settings.context
    say(args, f"{model.name} on {text.source}: up to {tokens:,} tokens; scales go to {args.out.resolve()}.")
    with sweep.progress_bar(tokens, "calibrate") as progress:
        scales = sweep.calibrate(model, text, settings, cache_format, progress)
    write_scales(args.out, scales)
    _print_table(scales)
    print(f"\nThe scales, for {scales.format}: {args.out}")
    return FINE


def _static_format(spelling: str) -> CacheFormat:
    try:
        cache_format = CacheFormat.of(spelling)
        sweep.static_quantizers(cache_format)
    except ValueError as error:
        raise BadArgumentError("format", f"cannot be calibrated: {error}") from error
    return cache_format


def _print_table(scales: CacheScales) -> None:
    """Print the scales of each layer: one, or the least and the greatest of its heads."""
    rows = []
    for layer, (key, value) in enumerate(zip(scales.key, scales.value, strict=True)):
        rows.append((str(layer), _shown(key), _shown(value)))
    print_columns(("layer", "key scales", "value scales"), rows, ">>>")


def _shown(scales: np.ndarray) -> str:
    least, greatest = f"{scales.min():.4g}", f"{scales.max():.4g}"
    return least if least == greatest else f"{least} to {greatest}"
