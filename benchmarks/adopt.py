"""Runs models of other packages with a quantized cache, against their own float cache.

    python benchmarks/adopt.py --models flax_attention,huggingface,encoder_decoders,penzai --out results.json
    python benchmarks/adopt.py --models jax_llm_examples,bonsai \\
        --source ../jax-llm-examples --source ../bonsai --out results.json

A group of models is a file in benchmarks/adopted, and needs its packages (see docs/adopt.md). Those of the
second command are in no package index: they are imported from your checkouts of their repositories, and
skipped without. Every model runs 64 greedy steps after a 64-token prompt, batch 2, in each format.
"""

import argparse
import importlib
import sys
from pathlib import Path

from adopted._checkouts import REPOSITORIES, read_checkout
from adopted._measure import measure
from record import circumstances, save

FORMATS = "int8,int8:token,fp8_e4m3"
MODELS = "flax_attention,huggingface,encoder_decoders,penzai,jax_llm_examples,bonsai"


def main(argv: list[str]) -> int:
    options = parse(argv)
    rows = []
    packages: set[str] = set()
    for group in options.models.split(","):
        if group in REPOSITORIES and not import_from_checkout(group, options):
            continue
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
    results = circumstances(packages)
    results["versions"] |= {REPOSITORIES[each.group].name: each.commit for each in options.source}
    save(options.out, {**results, "results": rows})
    return 0


def parse(argv: list[str]) -> argparse.Namespace:
    """Return the options; checkouts are those of groups that are measured, one of each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", default=MODELS, help="files of benchmarks/adopted")
    parser.add_argument(
        "--source",
        type=read_checkout,
        action="append",
        default=[],
        metavar="CHECKOUT",
        help=f"a checkout of {' or '.join(each.name for each in REPOSITORIES.values())}; may be repeated",
    )
    parser.add_argument("--formats", default=FORMATS, help="spellings, separated by commas")
    parser.add_argument("--out", type=Path, help="write the results here as JSON")
    options = parser.parse_args(argv)
    given = [checkout.group for checkout in options.source]
    for group in given:
        name = REPOSITORIES[group].name
        if given.count(group) > 1:
            parser.error(f"argument --source: {given.count(group)} checkouts of {name} came; pass one.")
        if group not in options.models.split(","):
            parser.error(
                f"argument --source: a checkout of {name} came, but {group} is not among the groups of "
                f"--models, {options.models}; add it there."
            )
    return options


def import_from_checkout(group: str, options: argparse.Namespace) -> bool:
    """Let a group's modules be imported from its checkout; say how to get one, and return False, without."""
    for checkout in options.source:
        if checkout.group == group:
            sys.path.insert(0, str(checkout.root))
            return True
    repository = REPOSITORIES[group]
    print(f"{repository.name} skipped: {repository.how_to_get_it()}", flush=True)
    return False


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
