"""The benchmark of decode attention on GPUs, as far as it runs without one."""

import functools
import importlib.util
import runpy
from pathlib import Path

import gpu_attention
import gpu_peers
import gpu_subjects
import pytest
from shapes import Shape

RESULTS = Path(__file__).parents[2] / "docs/includes/results.py"
ROUNDING = 2.0**-7  # of bfloat16 weights and outputs, over the largest output


@pytest.fixture(scope="module")
def inputs():
    return gpu_subjects.Inputs.random(Shape("small", (40, 32), 4, 2, 16, 8))


def measure(inputs, candidates, monkeypatch):
    """Measure candidates in one round of one step."""
    monkeypatch.setattr(gpu_subjects, "CALLS", 1)
    return gpu_attention.measure(inputs, candidates, 1, 1e9)


def test_the_benchmark_needs_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["gpu_attention"])
    with pytest.raises(SystemExit, match="1"):
        gpu_attention.main()
    assert "gpu_attention needs a GPU, but JAX finds only cpu" in capsys.readouterr().err


def test_a_candidate_that_fails_has_a_row_that_says_why(inputs, monkeypatch):
    def fails():
        raise ImportError("no such library")

    candidates = [*gpu_attention.our_candidates(inputs, ["int8:token"], ("xla",)), ("a peer", fails)]
    ours, peer = measure(inputs, iter(candidates), monkeypatch)
    assert ours["name"] == "qpaged xla int8:token" and ours["error"] < 0.1 and ours["milliseconds"] > 0
    live = 2 * 72 * 2  # rows of keys and values
    assert ours["bytes"] == live * (16 + 4)  # codes, and a float32 scale
    assert peer == {"name": "a peer", "refused": "ImportError: no such library"}


def test_the_jax_peer_attends_to_the_same_inputs(inputs, monkeypatch):
    options = {"interpret": True, "k_splits": 1, "pages_per_compute_block": 1}
    build = functools.partial(gpu_peers.jax_subject, inputs, "int8", **options)
    (row,) = measure(inputs, iter([("jax", build)]), monkeypatch)
    assert row["error"] < 0.03, row


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="needs torch")
@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_torch_peers_attend_to_the_same_inputs(inputs, monkeypatch):
    peers = [(name, build) for name, build in gpu_peers.candidates(inputs) if name.startswith("torch")]
    rows = {row["name"]: row for row in measure(inputs, iter(peers), monkeypatch)}
    assert "lengths differ" in rows["torch SDPA bfloat16, contiguous"]["refused"]
    for page_size in (8, 128):
        assert rows[f"torch FlexAttention bfloat16, pages of {page_size}"]["error"] < ROUNDING


def run(name, milliseconds, of_bandwidth, bits=8):
    """Return a row of the results."""
    return {
        "name": name, "milliseconds": milliseconds, "of_bandwidth": of_bandwidth, "bits": bits, "paged": True,
        "error": 0.01,
    }  # fmt: skip


def test_targets_are_judged_and_shown_in_the_table():
    shapes = {
        "64x8k": [
            run("qpaged gpu int8", 0.3, 0.86),
            run("a peer bfloat16", 0.6, 0.9, bits=16),
            {"name": "another", "refused": "ImportError: no such library"},
        ],
        "1x128k": [run("qpaged gpu int8", 0.2, 0.5)],
    }
    targets = gpu_attention.judge_targets(shapes)
    assert [target["met"] for target in targets] == [True, False, True]
    assert targets[2]["found"] == 2 and "(a peer bfloat16)" in targets[2]["what"]
    assert not any(target["met"] for target in gpu_attention.judge_targets({}))
    results = {
        "date": "2026-01-01", "device": "a GPU", "versions": {"jax": "0.11"}, "rounds": 9,
        "bytes_per_second": 4.3e12, "shapes": shapes, "targets": targets,
    }  # fmt: skip
    table = runpy.run_path(str(RESULTS))["gpu_table"](results)
    assert "| qpaged gpu int8 | 0.300 (86%) | 0.200 (50%) | 1.0e-02 |" in table
    assert "- another: ImportError: no such library" in table and "**missed**" in table
