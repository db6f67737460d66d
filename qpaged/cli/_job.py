"""Arguments of ``sweep``, ``tune`` and ``calibrate``: which model reads which text, and how much of it."""

import argparse
import functools
from typing import Any

from qpaged import sweep
from qpaged._bad_argument import BadArgumentError
from qpaged.cli._arguments import token_count, whole_number
from qpaged.cli._devices import add_devices, mesh_of
from qpaged.cli._output import say
from qpaged.cli._programs import keep_programs
from qpaged.models import read_scales


def add_job(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that choose the model, the text and the settings."""
    defaults = sweep.Settings()
    add = parser.add_argument
    add_checkpoint(parser)
    add(
        "--step",
        metavar="MODULE:FUNCTION",
        help="a model that qpaged.adopt can adopt, instead of a checkpoint: FUNCTION(sequences, length) "
        "gives (step, state), and step(state, tokens, positions) gives (logits, state)",
    )
    add_text(parser)
    add(
        "--batch",
        type=whole_number,
        metavar="N",
        default=defaults.batch,
        help="sequences in the cache at once (%(default)s)",
    )
    add(
        "--page-size",
        type=whole_number,
        metavar="N",
        default=defaults.page_size,
        help="tokens a page (%(default)s)",
    )
    add(
        "--compute",
        choices=sweep.COMPUTE_DTYPES,
        default=sweep.COMPUTE_DTYPES[0],
        help="what a checkpoint computes in, the reference included (%(default)s); bfloat16 is for devices "
        "that are faster in it",
    )
    add_devices(parser)
    add(
        "--bits-at",
        type=token_count,
        metavar="N",
        help="count the bytes of sequences of N tokens, in which the share of exact pages is another "
        "(those that are measured)",
    )
    add(
        "--quick",
        action="store_true",
        help="predictions alone: without decode, greedy texts, errors by layer and noise",
    )
    add("--dtype", choices=sweep.DTYPES, default=defaults.dtype, help="caches' logical dtype (%(default)s)")
    add(
        "--scales",
        metavar="FILE",
        help="static scales, for formats such as fp8_e4m3:tensor: what qpaged calibrate wrote, or a "
        "checkpoint that carries them (scales of 1)",
    )


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    """Add the argument that chooses a checkpoint."""
    model = "a Hugging Face checkpoint (the bundled model)"
    parser.add_argument("model", nargs="?", metavar="MODEL_DIR", help=model)


def add_text(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that choose the text, and how much of it is read."""
    defaults = sweep.Settings()
    add = parser.add_argument
    add("--text", metavar="FILE", help="what the model reads (held-out files of Python's own library)")
    add(
        "--tokenizer",
        metavar="DIR",
        help="a directory with a tokenizer.json, or bytes for models of bytes (the checkpoint's own; bytes "
        "with --step)",
    )
    add(
        "--tokens",
        type=token_count,
        metavar="N",
        default=defaults.tokens,
        help="tokens of the text (%(default)s)",
    )
    add("--context", type=token_count, metavar="N", help=f"tokens of a sequence (up to {defaults.context})")
    add(
        "--seed",
        type=whole_number,
        metavar="N",
        help="draw the sequences (they are spread evenly over the text)",
    )


def load_job(args: argparse.Namespace) -> tuple[sweep.Model, sweep.Text, sweep.Settings]:
    """Load the model, the text and the settings that the arguments choose; keep what is compiled for them.

    Raises:
        OSError, ValueError, ImportError: one of them cannot be loaded.
    """
    keep_programs()
    if args.step is not None and args.model is not None:
        raise ValueError("MODEL_DIR and --step each name a model; give one of them.")
    if args.step is None:
        return load_checkpoint_job(args)
    if args.scales is not None:
        raise BadArgumentError("scales", "must be left out with --step, whose cache has no static scales.")
    if args.compute != sweep.COMPUTE_DTYPES[0]:
        raise BadArgumentError("compute", "must be left out with --step, which computes as it does.")
    if args.mesh != 1:
        raise BadArgumentError("mesh", "must be left out with --step, which lies as it does.")
    if args.stream:
        raise BadArgumentError("stream", "must be left out with --step, which has its own weights.")
    if args.bits_at is not None:
        raise BadArgumentError("bits_at", "must be left out with --step, whose cache has one length.")
    text, settings = _load_text(args.text), _settings(args, args.context)
    return sweep.load_step(args.step, settings, args.tokenizer), text, settings


def load_checkpoint_job(args: argparse.Namespace) -> tuple[sweep.Decoder, sweep.Text, sweep.Settings]:
    """Load the checkpoint, the text and the settings that the arguments choose, as :func:`load_job` does."""
    text = _load_text(args.text)
    load = functools.partial(
        sweep.load_model, args.model, args.tokenizer, mesh=mesh_of(args), streamed=args.stream
    )
    if args.context is not None:
        settings = _settings(args, args.context)
        model = load(args.context)
    else:
        model = load()
        settings = _settings(args, min(sweep.Settings().context, model.longest))
    if args.scales is not None:
        model = _with_scales(model, args.scales)
    return model.computing_in(getattr(args, "compute", model.compute)), text, settings


def _with_scales(model: sweep.Decoder, path: str) -> sweep.Decoder:
    try:
        return model.with_scales(read_scales(path), path)
    except OSError as error:
        reason = f"{path!r} cannot be read ({error.strerror}); qpaged calibrate writes such a file."
        raise BadArgumentError("scales", reason) from error
    except ValueError as error:
        raise BadArgumentError("scales", f"cannot be used: {error}") from error


def say_job(args: argparse.Namespace, job: sweep.Sweep, work: str, files: str) -> None:
    """Say which model and text are measured, the work to do, and where files go."""
    say(args, f"{job.model.name} on {job.text.source}: {work}; files go to {files}.")
    if job.tokens < args.tokens // job.settings.context * job.settings.context:
        say(args, f"{job.text.source} is enough for {job.tokens:,} tokens only.")


def _load_text(path: str | None) -> sweep.Text:
    try:
        return sweep.load_text(path)
    except OSError as error:
        if path is None:
            raise
        reason = f"{path!r} cannot be read ({error.strerror}); give a text file."
        raise BadArgumentError("text", reason) from error


def _settings(args: argparse.Namespace, context: int | None) -> sweep.Settings:
    values: dict[str, Any] = {
        "tokens": args.tokens,
        "batch": args.batch,
        "page_size": args.page_size,
        "dtype": args.dtype,
        "seed": args.seed,
        "bits_at": getattr(args, "bits_at", None),
        "needles": getattr(args, "needles", ()),
    }
    if context is not None:
        values["context"] = context
    if getattr(args, "quick", False):
        return sweep.Settings.of_predictions_alone(**values)
    return sweep.Settings(**values)
