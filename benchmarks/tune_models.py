"""Tunes formats of 2 to 4 bits, keys and values apart and by layer, on the trained models.

    python benchmarks/real_models.py prepare --folder build/real
    python benchmarks/tune_models.py --folder build/real --out benchmarks/results/tune_models.json

One sequence measures what each format does to the keys and to the values of each layer, some hundred
predictions of it; the others verify the choice of each budget, beside the best pair that is the same in all
layers. What was measured is kept in the folder, so that an interrupted run goes on where it stopped. Bits are
those of long sequences, of which the exact pages are a small part.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

from real_measure import code_version, load
from real_sources import MODELS, TEXT, Source
from record import circumstances, save

from qpaged import sweep

BUDGETS = 2.5, 3.0, 3.5, 4.0
EXACT = "+exact128+sink16"
FORMATS = (
    "int4:channel+offset",
    "trellis3:channel",
    "trellis2:channel",
    "trellis3+rotate",
    "trellis2+rotate",
)
SEQUENCES, CONTEXT, PAGE_SIZE, BITS_AT = 4, 1024, 64, 32768


def tuned(source: Source, folder: Path) -> Iterator[dict[str, object]]:
    """Yield what was chosen for each budget."""
    text = sweep.Text(TEXT.title, (folder / TEXT.name).read_bytes())
    settings = sweep.Settings.of_predictions_alone(
        tokens=SEQUENCES * CONTEXT, context=CONTEXT, page_size=PAGE_SIZE, bits_at=BITS_AT
    )
    formats = tuple(f"{name}{EXACT}" for name in FORMATS)
    job = sweep.Sweep(load(folder / source.name, CONTEXT), text, formats, settings)
    conditions = [sweep.same_conditions(sweep.conditions(job)), code_version()]
    journal = sweep.Journal(folder / f"{source.name}.tune.json", conditions)
    for bits in BUDGETS:
        search = sweep.Tune(job, sweep.Budget(bits), "by layer")
        with sweep.progress_bar(search.tokens, "tune") as progress:
            found = search.run(journal, progress)
        runs = {run.format: run for run in found.runs}
        assert found.best_uniform is not None  # the smallest pair keeps each budget
        yield {
            "model": source.title,
            **found.record,
            "runs": [
                {
                    "format": name,
                    "bits_per_element": runs[name].bits_per_element,
                    "kl_mean": runs[name].kl_mean,
                    "kl_mean_se": runs[name].metrics["kl_mean_se"],
                }
                for name in (found.best_uniform.format, "by layer")
            ],
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("build/real"), help="of the prepared models")
    parser.add_argument("--out", type=Path, help="write the results here as JSON")
    arguments = parser.parse_args()
    conditions = {"sequences": SEQUENCES, "context": CONTEXT, "page_size": PAGE_SIZE, "bits_at": BITS_AT}
    results = {**circumstances(), **conditions, "exact": EXACT, "runs": (runs := [])}
    for source in MODELS:
        for run in tuned(source, arguments.folder):
            print(run["model"], run["verdict"], flush=True)
            runs.append(run)
            save(arguments.out, results)


if __name__ == "__main__":
    main()
