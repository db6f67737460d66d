"""``qpaged sweep --step``: a model with a cache of its own."""

import json
from pathlib import Path

import pytest

from qpaged.sweep import Settings, load_step

SMALL = ("--tokens", 240, "--context", 48, "--page-size", 8, "--batch", 4, "--dtype", "float32")


@pytest.fixture
def step(command, checkpoint, monkeypatch):
    """Return ``run(function, *arguments)``, which sweeps a function of ``support.contiguous_step``."""
    monkeypatch.setenv("CHECKPOINT", str(checkpoint))
    monkeypatch.syspath_prepend(Path(__file__).parent)

    def run(function, *arguments, name="sweep", **paths):
        return command(
            name, "--step", f"support.contiguous_step:{function}", *SMALL, *arguments, model=None, **paths
        )

    return run


@pytest.mark.long
def test_a_step_is_measured_as_the_checkpoint_that_it_runs(step, command):
    formats = ("--formats", "int8:token,int8:token/int4:token", "--json")
    result = step("make_step", *formats, out="step")
    assert result.status == 0
    step_runs = json.loads(result.out)["runs"]
    paged_runs = json.loads(command("sweep", *SMALL, *formats, out="paged").out)["runs"]
    for run, expected in zip(step_runs, paged_runs, strict=True):
        assert run["format"] == expected["format"]
        assert run["bytes_per_token"] == expected["bytes_per_token"]
        for name in ("kl_mean", "kl_p99", "perplexity", "same_top", "greedy_first_difference"):
            assert run[name] == pytest.approx(expected[name], rel=1e-2, abs=1e-9)
        assert run["attention_error"] is None and run["attention_error_by_layer"] == []
    assert step_runs[1]["kl_mean"] > 1e-6
    results = json.loads((result.directory / "results.json").read_text())
    assert results["reference"] == "the model's own cache, as it is"
    assert results["model"]["layers"] == 2 and results["model"]["kv_heads"] == 2


@pytest.mark.long
def test_a_step_is_tuned(step, tmp_path):
    result = step(
        "make_step",
        "--bits",
        10,
        "--formats",
        "int8:token",
        "--json",
        name="tune",
        out="format.json",
    )
    assert result.status == 0
    assert json.loads(result.out)["tune"]["layers"] == [["int8:token"] * 2] * 2
    assert (tmp_path / "format.json").exists()


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("no_cache", "cache"),
        ("nothing", "--step support.contiguous_step:nothing cannot be imported"),
        ("lose_state", "the state must come back in the structure, shapes and dtypes in which it came"),
        (
            "last_only",
            "logits must be (sequences, n, vocabulary), for 4 sequences of 24 tokens, but came as (4, 1,",
        ),
        ("short", "the cache must hold 4 sequences of 48 tokens"),
        ("broken", "--step support.contiguous_step:broken: RuntimeError: no luck"),
        ("leave", "--step support.contiguous_step:leave: SystemExit: 0"),
    ],
)
def test_a_step_that_cannot_be_swept_is_refused(step, function, message):
    result = step(function, "--formats", "int8:token")
    assert (result.status, result.out) == (2, "")
    assert message in result.err


def test_constants_inside_a_compiled_step_change_its_hash(step, monkeypatch):
    settings = Settings(batch=2, context=8, tokens=8)
    first = load_step("support.contiguous_step:closed_over", settings).sha256
    again = load_step("support.contiguous_step:closed_over", settings).sha256
    monkeypatch.setenv("FACTOR", "1.5")
    assert first == again != load_step("support.contiguous_step:closed_over", settings).sha256


def test_a_spelling_without_a_function_is_refused(command):
    result = command("sweep", "--step", "contiguous_step", *SMALL, model=None)
    assert result.status == 2
    assert "--step must be given as module:function, but came as 'contiguous_step'" in result.err


def test_a_model_and_a_step_together_are_refused(command):
    result = command("sweep", "--step", "support.contiguous_step:make_step", *SMALL)
    assert result.status == 2 and "MODEL_DIR and --step each name a model; give one of them" in result.err
