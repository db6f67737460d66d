"""Runs models of other packages with a quantized cache, against their own float cache.

    python benchmarks/adopt.py --models flax_attention,huggingface,penzai --out results.json

A group of models is a file in benchmarks/adopted, and needs its packages (see docs/adopt.md). Every model
runs 64 greedy steps after a 64-token prompt, batch 2, in each format.
"""

import argparse
import importlib
import sys
from pathlib import Path

from adopted._measure import measure
from record import circumstances, save

FORMATS = "int8,int8:token,fp8_e4m3"


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--models", default="flax_attention,huggingface,penzai", help="files of benchmarks/adopted"
    )
    parser.add_argument("--formats", default=FORMATS, help="spellings, separated by commas")
    parser.add_argument("--out", type=Path, help="write the results here as JSON")
    options = parser.parse_args(argv)

    rows = []
    packages: set[str] = set()
    for group in options.models.split(","):
        for case in importlib.import_module(f"adopted.{group}").cases():
            packages |= set(case.packages)
            for result in measure(case, options.formats.split(",")):
                rows.append(result.row())
                print(
                    f"{result.model:40} {result.format:10} same {result.same_tokens:6.1%} "
                    f"KL {result.kl_mean:.1e} bytes {result.ratio:.3f} "
                    f"full-size floats {result.full_size_floats} "
                    f"ms {result.ms_float:.2f} {result.ms_quantized:.2f} {result.ms_materialized:.2f}",
                    flush=True,
                )
    save(options.out, {**circumstances(packages), "results": rows})
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
