"""Prints what `lanes.json` says of CI's lanes, for `.ci/run` and for CONTRIBUTING.md.

python .ci/lanes.py names      the lanes of every change, in the order in which they are run
python .ci/lanes.py light      the lanes that run beside the others, since one core is enough for them
python .ci/lanes.py table      the Markdown table of CONTRIBUTING.md
"""

import json
import sys
from pathlib import Path

LANES = json.loads(Path(__file__).with_name("lanes.json").read_text(encoding="utf-8"))


def names() -> str:
    """Return the lanes that every change runs, separated by spaces."""
    return " ".join(lane["lane"] for lane in LANES if not lane.get("nightly"))


def light() -> str:
    """Return the light lanes, separated by spaces."""
    return " ".join(lane["lane"] for lane in LANES if lane["light"])


def table() -> str:
    """Return a Markdown table with a row for each lane."""
    rows = []
    for lane in LANES:
        when = ", nightly" if lane.get("nightly") else ""
        rows.append(f"| `{lane['lane']}`{when} | {lane['checks']} |")
    return "\n".join(["| lane | what it checks |", "|---|---|", *rows])


if __name__ == "__main__":
    print({"names": names, "light": light, "table": table}[sys.argv[1]]())
