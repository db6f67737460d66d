"""Asks formats for numbers hidden in long texts, on the trained models, as ``qpaged sweep --needles`` does.

python benchmarks/real_models.py prepare --folder build/real
python benchmarks/needles.py --folder build/real --out benchmarks/results/needles.json
"""

import argparse
import time
from pathlib import Path

from real_formats import format_of
from real_measure import load
from real_sources import MODELS, TEXT
from record import circumstances, save

from qpaged import sweep
from qpaged.sweep.measure import find, hide

LENGTHS = 1024, 4096, 8192
PAGE_SIZE = 64
FORMATS = (
    "plain",
    "int8",
    "int4:token+rotate",
    "int4:channel+offset+exact128+sink16/trellis2+rotate+exact128+sink16",
    "trellis2:channel+exact128+sink16/trellis2+rotate+exact128+sink16",
    "int2+rotate",
    "int2",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("build/real"), help="of the prepared models")
    parser.add_argument("--models", default=",".join(source.name for source in MODELS))
    parser.add_argument("--out", type=Path, help="write the results here as JSON")
    arguments = parser.parse_args()
    text = sweep.Text(TEXT.title, (arguments.folder / TEXT.name).read_bytes())
    runs: list[dict[str, object]] = []
    for source in MODELS:
        if source.name not in arguments.models.split(","):
            continue
        model = load(arguments.folder / source.name, max(LENGTHS))
        for length in LENGTHS:
            needles = hide(text, model.tokenizer, length)
            settings = sweep.Settings(page_size=PAGE_SIZE).of_needles(length)
            for spelling in FORMATS:
                start = time.perf_counter()
                stream = model.stream(format_of(spelling), settings, settings.batch)
                score = find(model, stream, needles, settings, lambda tokens: None)
                seconds = round(time.perf_counter() - start, 1)
                runs.append({"model": source.title, "format": spelling, **score, "seconds": seconds})
                print(runs[-1], flush=True)
                save(arguments.out, {**circumstances(), "page_size": PAGE_SIZE, "runs": runs})


if __name__ == "__main__":
    main()
