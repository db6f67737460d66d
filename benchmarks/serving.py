"""Serves random requests for very many steps, and counts what was done; any wrong answer ends it.

    python benchmarks/serving.py --out benchmarks/results/serving.json

It is the small engine of the tests, on caches of several formats, without a sliding window and with one. A
step starts a prompt, decodes, drafts, rewinds, forks, frees, swaps or asks for too much; attention of all
sequences is compared with that of their own tokens after most of them.
"""

import argparse
import sys
import time
from collections import Counter
from pathlib import Path

from record import circumstances, save

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from support.serving import WINDOW, Serving, serve

FORMATS = (
    None,
    "raw",
    "int8",
    "int8:token",
    "int8:channel+exact4+sink4",
    "int4:token+rotate",
    "int4:token+rotate+exact8",
    "int3:token+offset",
    "fp8_e4m3",
    "nvfp4",
)
STEPS_OF_A_SEED = 2_000


def served(format: str | None, window: int | None, steps: int) -> dict[str, int]:
    """Return how often each thing was done in so many steps."""
    done = Counter[str]()
    for seed in range(-(-steps // STEPS_OF_A_SEED)):
        serving = Serving(format, window)
        serve(serving, seed, STEPS_OF_A_SEED)
        done.update(serving.done)
        done["steps"] += STEPS_OF_A_SEED
    return dict(sorted(done.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1_000_000, help="of all formats together")
    parser.add_argument("--out", type=Path, help="where to save the counts")
    arguments = parser.parse_args()
    cases = [(format, window) for format in FORMATS for window in (None, WINDOW)]
    runs = []
    for format, window in cases:
        start = time.perf_counter()
        done = served(format, window, arguments.steps // len(cases))
        seconds = round(time.perf_counter() - start)
        name = format or "plain"
        print(
            f"{name}, window {window}, {seconds} s:", ", ".join(f"{n:,} {what}" for what, n in done.items())
        )
        sys.stdout.flush()
        runs.append({"format": name, "window": window, "done": done})
        save(arguments.out, {**circumstances(), "runs": runs})


if __name__ == "__main__":
    main()
