"""KL by the position of tokens."""

import json

import numpy as np
import pytest

from qpaged.sweep.measure._statistics import by_position


def test_means_are_those_of_equal_parts_of_the_sequences():
    values = np.arange(3 * 16, dtype=float).reshape(3, 16)
    found = by_position(values)
    np.testing.assert_allclose([mean for mean, _ in found], values.reshape(3, 8, 2).mean(axis=(0, 2)))
    assert all(error > 0 for _, error in found)
    assert len(by_position(np.ones((1, 5)))) == 5


def test_exact_pages_save_the_first_tokens(sweep):
    formats = ("--formats", "int2:token,int2:token+exact16", "--dtype", "float32")
    done = sweep("--tokens", 96, "--context", 48, "--page-size", 8, "--quick", *formats)
    record = json.loads((done.directory / "results.json").read_text())
    assert not record["failures"]
    runs = {run["format"]: run["kl_by_position"] for run in record["runs"]}
    assert runs["plain"] == [0] * 8
    assert min(runs["int2:token"]) > 1e-3
    assert runs["int2:token+exact16"][:2] == pytest.approx([0, 0], abs=1e-9)
    assert runs["int2:token+exact16"][-1] > 1e-3
    page = (done.directory / "report.html").read_text()
    assert "Divergence by position" in page and "42 to 47" in page
