"""CI's lanes are named in .ci/lanes.json alone."""

import re

from support.doc_scripts import ROOT, script

lanes = script(ROOT / ".ci/lanes.py")
NAMES = [lane["lane"] for lane in lanes.LANES]


def test_contributing_shows_the_table_of_lanes():
    shown = (ROOT / "CONTRIBUTING.md").read_text()
    assert lanes.table() in shown, "CONTRIBUTING.md must show what `python .ci/lanes.py table` prints"


def test_every_lane_has_a_function_in_the_script():
    defined = re.findall(r"^lane_(\w+)\(\)", (ROOT / ".ci/run").read_text(), re.MULTILINE)
    assert sorted(defined) == sorted(NAMES)


def test_the_workflow_names_no_lane_itself():
    workflow = (ROOT / ".github/workflows/ci.yml").read_text()
    assert "fromJSON(needs.lanes.outputs.lanes)" in workflow
    assert not re.search(rf"lane: *\[?({'|'.join(NAMES)})\b", workflow)
