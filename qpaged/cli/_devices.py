"""Which devices a model is measured on: one, several, or those of several processes."""

import argparse
import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax
from jax.sharding import Mesh

from qpaged._bad_argument import BadArgumentError
from qpaged._compat import auto_mesh
from qpaged.sweep import RESULTS

PROCESSES = "HOST:PORT,COUNT,NUMBER"


def mesh_axes(text: str) -> tuple[int, int]:
    """Return (groups, devices of a group) of ``"8"``, ``"tp=8"`` or ``"dp=32,tp=8"``."""
    sizes: dict[str, int] = {}
    parts = [f"tp={text}"] if text.strip().isdigit() else text.split(",")
    for part in parts:
        name, _, count = part.strip().partition("=")
        is_count = count.strip().isdigit() and int(count) > 0
        if name not in ("dp", "tp") or name in sizes or not is_count:
            raise argparse.ArgumentTypeError(f"{text!r:.60} is no mesh; 8, tp=8 and dp=32,tp=8 are.")
        sizes[name] = int(count)
    return sizes.get("dp", 1), sizes.get("tp", 1)


def heads_axis(text: str) -> int:
    """Return the devices of ``"8"`` or ``"tp=8"``."""
    groups, devices = mesh_axes(text)
    if groups > 1:
        raise argparse.ArgumentTypeError(
            f"{text!r:.60} must have no dp; tp=8 divides a model over 8 devices."
        )
    return devices


def processes(text: str) -> tuple[str, int, int]:
    """Return (address, count, number) of ``"host:1234,4,0"``."""
    address, *numbers = text.split(",")
    if len(numbers) != 2 or not all(number.strip().isdigit() for number in numbers) or ":" not in address:
        raise argparse.ArgumentTypeError(
            f"{text!r:.60} must be {PROCESSES}, as host:1234,4,0 of the first of four; give none where JAX "
            f"finds them by itself."
        )
    count, number = map(int, numbers)
    return address, count, number


def add_devices(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that choose the devices of a checkpoint."""
    parser.add_argument(
        "--mesh",
        type=heads_axis,
        metavar="tp=N",
        default=1,
        help="divide a checkpoint's weights and KV heads over N devices (1)",
    )
    parser.add_argument(
        "--stream",
        action="store_true",
        help="read weights from their files whenever they are used, for a checkpoint that does not fit into "
        "memory; slow, and best with --quick",
    )


def add_processes(parser: argparse.ArgumentParser) -> None:
    """Add the argument that joins several processes."""
    parser.add_argument(
        "--distributed",
        type=processes,
        nargs="?",
        const=(None, None, None),
        metavar=PROCESSES,
        help="join other processes that run this command: those that jax.distributed finds by itself, as on "
        "TPU pods and under Slurm, or COUNT of them, this being NUMBER from 0, which meet at HOST:PORT; "
        "--mesh is over the devices of all",
    )


def mesh_of(args: argparse.Namespace) -> Mesh | None:
    """Return the mesh that the arguments choose; None for one device."""
    if args.mesh == 1:
        return None
    if args.mesh > jax.device_count():
        raise BadArgumentError(
            "mesh", f"must have at most the {jax.device_count()} devices that are here, but has {args.mesh}."
        )
    return auto_mesh({"tp": args.mesh})


@contextlib.contextmanager
def as_one_of_all(args: argparse.Namespace) -> Iterator[None]:
    """Join the processes that were asked for, of which the first alone writes results and messages.

    The others measure the same, and so read what it knows from an earlier sweep.
    """
    if args.distributed is None:
        yield
        return
    address, count, number = args.distributed
    jax.distributed.initialize(address, count, number)
    if args.mesh != jax.device_count():
        raise BadArgumentError(
            "mesh",
            f"must be over the {jax.device_count()} devices of all processes, but came as tp={args.mesh}.",
        )
    if jax.process_index() == 0:
        yield
        return
    with (
        tempfile.TemporaryDirectory() as folder,
        Path(os.devnull).open("w") as nothing,
        contextlib.redirect_stdout(nothing),
        contextlib.redirect_stderr(nothing),
    ):
        known = args.out / RESULTS
        if known.is_file():
            shutil.copy(known, folder)
        args.out = Path(folder)
        yield
