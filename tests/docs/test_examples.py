"""The examples run, as a reader would run them."""

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "docs/examples"


@pytest.mark.parametrize(
    ("name", "said"),
    [("int8_in_your_model", "nothing was materialized"), ("own_format", "int8:token: ")],
)
def test_an_example_runs_as_a_script(name, said):
    done = subprocess.run([sys.executable, EXAMPLES / f"{name}.py"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert said in done.stdout
