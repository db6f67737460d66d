"""``qpaged calibrate``, and sweeps under the scales that it writes."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
from support.small_sweep import SIZES

import qpaged
from qpaged.models import load_checkpoint, read_scales
from qpaged.sweep import load_model, load_text
from qpaged.sweep.measure import Settings, cut

SMALL = ("--tokens", "192", "--context", "64")
LARGEST = {"fp8_e4m3": 448, "fp8_e5m2": 57344}


@pytest.fixture
def calibrate(command):
    """Return ``calibrate(*arguments)``: it runs ``qpaged calibrate`` on the small model."""
    return lambda *arguments, out="scales.json", **paths: command("calibrate", *arguments, out=out, **paths)


def largest_of(checkpoint, text_file, transform=None):
    """The largest keys and values of each layer and head, [2, layers, kv_heads], from one forward pass."""
    model = load_model(checkpoint, "bytes")
    sequences = cut(load_text(text_file), model.tokenizer, Settings(tokens=192, context=64)).tokens
    largest = np.zeros((2, SIZES.num_hidden_layers, SIZES.num_key_value_heads))
    config, params = load_checkpoint(checkpoint)

    def attend(layer, query, key, value):
        for side, rows in enumerate((key, value)):
            held = rows if transform is None else transform.forward(rows, -1)
            absmax = np.abs(np.asarray(held)).max(axis=(0, 2))
            largest[side, layer] = np.maximum(largest[side, layer], absmax)
        heads = jnp.repeat(key, 2, axis=1), jnp.repeat(value, 2, axis=1)
        scores = jnp.einsum("qhd,khd->hqk", query, heads[0]) / 4
        causal = np.tri(len(query), dtype=bool)
        weights = jnp.exp(jnp.where(causal, scores - scores.max(-1, keepdims=True), -jnp.inf))
        weights = weights / weights.sum(-1, keepdims=True)
        return jnp.einsum("hqk,khd->qhd", weights, heads[1])

    for sequence in sequences[:, :-1]:
        tokens = jnp.asarray(sequence)
        qpaged.models.final_hidden(params, config, tokens, jnp.arange(len(tokens)), attend, dtype="float32")
    return largest


@pytest.mark.parametrize(
    "format", ["fp8_e4m3:head", "fp8_e4m3:tensor", "fp8_e5m2:head", "fp8_e4m3:head+rotate"]
)
def test_scales_are_the_largest_magnitudes_over_the_largest_number(calibrate, checkpoint, text_file, format):
    done = calibrate(*SMALL, "--format", format)
    assert done.status == 0
    scales = read_scales(done.directory)
    largest = largest_of(checkpoint, text_file, qpaged.get_quantizer(format).transform)
    if ":tensor" in format:
        largest = largest.max(axis=-1)
    expected = largest / LARGEST[format.partition(":")[0]]
    np.testing.assert_allclose(scales.key, expected[0], rtol=1e-4)
    np.testing.assert_allclose(scales.value, expected[1], rtol=1e-4)
    assert scales.format == format.replace(":head", "").replace(":tensor", "")
    lines = done.out.splitlines()
    assert lines[0].split("  ") and len(lines) == 1 + SIZES.num_hidden_layers + 2
    assert lines[-1] == f"The scales, for {scales.format}: {done.directory}"
    assert "qpaged calibrate: keys and values" in done.err


def test_scales_are_written_as_the_tensors_of_checkpoints(calibrate, checkpoint):
    done = calibrate(*SMALL, "--format", "fp8_e4m3:tensor", out="scales.safetensors")
    assert done.status == 0
    assert read_scales(done.directory).key.shape == (SIZES.num_hidden_layers,)


@pytest.mark.long
def test_sweeps_and_searches_take_scales(calibrate, command, tmp_path):
    scales = calibrate(*SMALL).directory
    arguments = (*SMALL, "--formats", "fp8_e4m3:tensor,fp8_e4m3:head,fp8_e5m2:head,int8")
    scaled = command("sweep", *arguments, "--scales", scales, out="scaled")
    results = json.loads((scaled.directory / "results.json").read_text())
    assert [run["format"] for run in results["runs"]] == ["plain", "fp8_e4m3:tensor", "fp8_e4m3:head", "int8"]
    (failure,) = results["failures"]
    assert "scales must be chosen for the format of the keys, fp8_e5m2, but are for fp8_e4m3" in str(failure)

    ones = command("sweep", *SMALL, "--formats", "fp8_e4m3:tensor", out="ones")
    other = json.loads((ones.directory / "results.json").read_text())
    assert results["model"]["sha256"] != other["model"]["sha256"]
    assert results["runs"][1]["kl_mean"] != other["runs"][1]["kl_mean"]

    tuned = command(
        "tune",
        *SMALL,
        "--scales",
        scales,
        "--formats",
        "fp8_e4m3:head,int4:token",
        "--bits",
        "9",
        out="format.json",
    )
    assert tuned.status == 0, tuned.err


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        (
            "calibrate",
            ("--format", "int8"),
            "--format cannot be calibrated: int8 is not of static scales alone, for the keys",
        ),
        ("calibrate", ("--format", "int9"), "--format cannot be calibrated: no format is named 'int9'"),
        (
            "calibrate",
            ("--out", "scales.txt"),
            "--out must name a file that ends in .json or .safetensors, but came",
        ),
        (
            "calibrate",
            ("--format", "fp8_e5m2:head", "--out", "e5m2.safetensors"),
            "--out cannot hold the scales of fp8_e5m2:head: scales must be for fp8_e4m3 in a",
        ),
        (
            "calibrate",
            ("--out", "directory.json"),
            "--out must name a file, but 'directory.json' is a directory.",
        ),
        (
            "sweep",
            ("--scales", "heads.json"),
            "--scales cannot be used: scales must be of the model's 2 KV heads, but those of",
        ),
        (
            "sweep",
            ("--scales", "scales.txt"),
            "--scales cannot be used: path must be a .json or .safetensors file, or the directory of a",
        ),
        (
            "sweep",
            ("--scales", "nowhere.json"),
            "--scales 'nowhere.json' cannot be read (No such file or directory);",
        ),
        (
            "sweep",
            ("--scales", "few.json"),
            "--scales cannot be used: scales must be of the model's 2 layers, but are of 1;",
        ),
        (
            "sweep",
            ("--scales", "bad.json"),
            "--scales cannot be used: bad.json must hold cache scales of version 1",
        ),
    ],
)
def test_what_cannot_be_used_is_said_in_the_words_of_the_flags(
    command, tmp_path, monkeypatch, name, arguments, message
):
    monkeypatch.chdir(tmp_path)
    qpaged.CacheScales([1.0], [1.0]).save("few.json")
    qpaged.CacheScales([[1.0] * 7] * 2, [1.0] * 2).save("heads.json")
    (tmp_path / "directory.json").mkdir()
    (tmp_path / "bad.json").write_text("{}")
    done = command(name, *SMALL, *arguments, out="out.json" if name == "calibrate" else "out")
    assert done.status == 2 and f"qpaged {name}: {message}" in done.err


def calibrated(checkpoint, text_file, format, change):
    """Return the scales of the small model with the value projection of its second layer changed."""
    model = load_model(checkpoint, "bytes")
    params = dict(model.params)
    name = next(name for name in params if "1" in name and "v_proj" in name)
    params[name] = change(jnp.asarray(params[name]))
    model = dataclasses.replace(model, params=params)
    settings = Settings(tokens=192, context=64)
    cache_format = qpaged.CacheFormat.of(format)
    return qpaged.sweep.calibrate(model, load_text(text_file), settings, cache_format, lambda *_: None)


def test_heads_that_are_zeros_take_no_part(checkpoint, text_file):
    half = SIZES.num_key_value_heads // 2 * SIZES.head_dim
    scales = calibrated(checkpoint, text_file, "fp8_e4m3:head", lambda v: v.at[:half].set(0))
    unchanged = calibrated(checkpoint, text_file, "fp8_e4m3:head", lambda v: v)
    np.testing.assert_array_equal(scales.value[1], np.full(2, unchanged.value[1, 1]))


def test_keys_and_values_that_are_not_finite_are_refused(checkpoint, text_file):
    with pytest.raises(ValueError, match="must have finite values to be calibrated, but those of layer 1"):
        calibrated(checkpoint, text_file, "fp8_e4m3:head", lambda v: v.at[0, 0].set(jnp.nan))


def test_scales_do_not_go_with_a_step(command):
    done = command("sweep", "--step", "a:b", "--scales", "scales.json", model=None)
    assert "--scales must be left out with --step, whose cache has no static scales." in done.err
