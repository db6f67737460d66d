"""What the commands share."""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from qpaged import sweep

FINE, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130


def say(args: argparse.Namespace, message: str) -> None:
    """One line on stderr."""
    print(f"qpaged {args.command}: {' '.join(message.split())}", file=sys.stderr)


def add_job(parser: argparse.ArgumentParser) -> None:
    """The arguments that say which model is run over which text."""
    default, add = sweep.Settings(), parser.add_argument
    add("model", nargs="?", metavar="MODEL_DIR", help="a Hugging Face checkpoint (the bundled model)")
    add(
        "--step",
        metavar="MODULE:FUNCTION",
        help="a model that qpaged.adopt can adopt, instead of a checkpoint: FUNCTION(sequences, length) "
        "gives (step, state), and step(state, tokens, positions) gives (logits, state)",
    )
    add("--text", metavar="FILE", help="what to predict (held-out files of Python's own library)")
    add(
        "--tokenizer",
        metavar="DIR",
        help="a directory with a tokenizer.json, or bytes for models of bytes (the checkpoint's own; bytes "
        "with --step)",
    )
    add("--tokens", type=int, metavar="N", default=default.tokens, help="tokens to predict (%(default)s)")
    add("--context", type=int, metavar="N", help=f"tokens of a sequence (up to {default.context})")
    add(
        "--batch",
        type=int,
        metavar="N",
        default=default.batch,
        help="sequences in the cache at once (%(default)s)",
    )
    add("--page-size", type=int, metavar="N", default=default.page_size, help="tokens a page (%(default)s)")
    add("--dtype", choices=sweep.DTYPES, default=default.dtype, help="caches' logical dtype (%(default)s)")
    add("--seed", type=int, metavar="N", help="draw the sequences (they are spread evenly over the text)")


def load_job(args: argparse.Namespace) -> tuple[sweep.Model, sweep.Text, sweep.Settings]:
    """The model, the text and the settings that are asked for.

    Raises:
        OSError, ValueError, ImportError: they cannot be had.
    """
    if args.step is not None and args.model is not None:
        raise ValueError("MODEL_DIR and --step each name a model; give one of them.")
    text = sweep.load_text(args.text)
    asked: dict[str, Any] = {
        "tokens": args.tokens,
        "batch": args.batch,
        "page_size": args.page_size,
        "dtype": args.dtype,
        "seed": args.seed,
    }
    if args.context is not None:
        asked["context"] = args.context
    if args.step is not None:
        settings = sweep.Settings(**asked)
        return sweep.load_step(args.step, settings, args.tokenizer), text, settings
    if args.context is None:
        model = sweep.load_model(args.model, args.tokenizer)
        return model, text, sweep.Settings(**asked, context=min(sweep.Settings().context, model.longest))
    settings = sweep.Settings(**asked)
    return sweep.load_model(args.model, args.tokenizer, args.context), text, settings


def say_if_short(args: argparse.Namespace, job: sweep.Sweep) -> None:
    """Say so where a text is shorter than asked for."""
    if job.tokens < args.tokens // job.settings.context * job.settings.context:
        say(args, f"{job.text.source} is enough for {job.tokens:,} tokens only.")


def split_formats(spellings: str) -> list[str]:
    """The formats of a list with commas."""
    return [part.strip() for part in spellings.split(",")]


def make_writable(directory: Path, option: str) -> None:
    """Make a directory for results.

    Raises:
        ValueError: nothing can be written there.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"{option} {directory} cannot be made ({error.strerror}); give a directory."
        ) from error
    if not os.access(directory, os.W_OK):
        raise ValueError(f"{option} {directory} cannot be written to; give another directory.")
