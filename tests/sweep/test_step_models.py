"""``qpaged sweep --step``: a model with a cache of its own."""

import json
import sys
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
        ("lose_state", "the structure, shapes and dtypes in which it came, but state['cache']"),
        (
            "last_only",
            "logits must be (sequences, n, vocabulary), for 4 sequences of 24 tokens, but came as (4, 1,",
        ),
        ("short", "the cache must hold 4 sequences of 48 tokens"),
        (
            "broken",
            "--step support.contiguous_step:broken failed with RuntimeError: no luck (contiguous_step.py, ",
        ),
        ("leave", "--step support.contiguous_step:leave failed with SystemExit: 0 (contiguous_step.py, line"),
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


MODULE = """import jax.numpy as jnp

number = 3
of_nothing = lambda: None
none = lambda sequences, length: None
three = lambda sequences, length: (1, 2, 3)
narrow = lambda sequences, length: (lambda state: state, {})
text = lambda sequences, length: (lambda state, tokens, positions: state, {"k": "abc"})

def alone(sequences, length):
    return lambda state, tokens, positions: state["k"], {"k": jnp.zeros((sequences, length, 2, 8))}

def shorter(sequences, length):
    def step(state, tokens, positions):
        return jnp.zeros((*tokens.shape, 256)), {"k": state["k"][:, 1:]}
    return step, {"k": jnp.zeros((sequences, length, 2, 8))}

def large(sequences, length):
    raise MemoryError
"""


@pytest.mark.parametrize(
    ("spelling", "message"),
    [
        ("made_steps", "--step must be MODULE:FUNCTION, as model:make_step for model.py in the working"),
        ("made_steps.py:none", "--step made_steps.py:none must leave out .py: made_steps:none."),
        ("made_step:none", "--step made_step:none cannot be imported: there is no module made_step, neither"),
        (
            "no.such:none",
            "--step no.such:none cannot be imported: ModuleNotFoundError: No module named 'no'.",
        ),
        (
            "made_steps:nothing",
            "--step made_steps:nothing cannot be imported: {directory}/made_steps.py has no",
        ),
        ("bad_syntax:f", "--step bad_syntax:f cannot be imported: invalid syntax (bad_syntax.py, line 1)."),
        ("script:f", "--step script:f cannot be imported: SystemExit: 3 (script.py, line 2)."),
        ("made_steps:number", "--step made_steps:number: it must be a function, but is of type int."),
        (
            "made_steps:of_nothing",
            "--step made_steps:of_nothing: it must take (sequences, length), but takes ().",
        ),
        ("made_steps:none", "--step made_steps:none must return (step, state), but returned None."),
        ("made_steps:three", "--step made_steps:three must return (step, state), but returned 3 values."),
        (
            "made_steps:narrow",
            "--step made_steps:narrow: its step must take (state, tokens, positions), but takes",
        ),
        (
            "made_steps:text",
            "--step made_steps:text: its state must hold arrays alone, but state['k'] is of type",
        ),
        (
            "made_steps:alone",
            "--step made_steps:alone: its step must return (logits, state), but returned one",
        ),
        (
            "made_steps:shorter",
            "--step made_steps:shorter: the state must come back in the structure, shapes and",
        ),
        ("made_steps:large", "the memory is not enough; give a smaller --batch or --context."),
    ],
)
def test_what_makes_no_step_is_refused(command, tmp_path, monkeypatch, spelling, message):
    (tmp_path / "made_steps.py").write_text(MODULE)
    (tmp_path / "bad_syntax.py").write_text("def (")
    (tmp_path / "script.py").write_text("import sys\nsys.exit(3)")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "made_steps", raising=False)
    result = command("sweep", "--step", spelling, *SMALL, "--formats", "int8", model=None)
    assert (result.status, result.err.count("\n")) == (2, 1)
    assert result.err.startswith(f"qpaged sweep: {message.format(directory=tmp_path)}")


def test_the_leaf_of_the_state_that_changed_is_named(command, tmp_path, monkeypatch):
    (tmp_path / "made_steps.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "made_steps", raising=False)
    result = command("sweep", "--step", "made_steps:shorter", *SMALL, "--formats", "int8", model=None)
    assert "but state['k'] was float32[4, 48, 2, 8], and is float32[4, 47, 2, 8].\n" in result.err


def test_a_model_and_a_step_together_are_refused(command):
    result = command("sweep", "--step", "support.contiguous_step:make_step", *SMALL)
    assert result.status == 2 and "MODEL_DIR and --step each name a model; give one of them" in result.err
