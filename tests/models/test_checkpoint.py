"""Checkpoints survive a round trip, and each damaged one says what is wrong with it."""

import dataclasses
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from qpaged.models import (
    DecoderConfig,
    Rope,
    checkpoint_sha256,
    init_params,
    load_checkpoint,
    save_checkpoint,
)

CONFIG = DecoderConfig(
    vocab_size=11,
    hidden_size=12,
    intermediate_size=20,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=6,
    rope=Rope(theta=5000.0),
    max_position_embeddings=64,
)
Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture
def params():
    return init_params(CONFIG, jax.random.key(0))


@pytest.fixture
def directory(tmp_path, params):
    save_checkpoint(tmp_path / "model", CONFIG, params, dtype=jnp.float32)
    return tmp_path / "model"


def edit_config(directory, **changes):
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def drop_from_config(directory, *names):
    path = directory / "config.json"
    found = json.loads(path.read_text())
    path.write_text(json.dumps({name: value for name, value in found.items() if name not in names}))


def edit_weights(directory, edit):
    weights = load_file(directory / "model.safetensors")
    edit(weights)
    save_file(weights, directory / "model.safetensors")


def test_float32_round_trip_is_exact(directory, params):
    config, loaded = load_checkpoint(directory)
    assert config == CONFIG
    assert loaded.keys() == params.keys()
    for name, weight in params.items():
        np.testing.assert_array_equal(loaded[name], weight)


@pytest.mark.parametrize("stored", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("asked", [None, jnp.float32])
def test_weights_keep_their_dtype_or_are_cast(tmp_path, params, stored, asked):
    save_checkpoint(tmp_path, CONFIG, params, stored)
    _, loaded = load_checkpoint(tmp_path, asked)
    for name, weight in params.items():
        assert loaded[name].dtype == jnp.dtype(asked or stored)
        np.testing.assert_array_equal(loaded[name], weight.astype(stored).astype(asked or stored))


def test_weights_are_saved_as_bfloat16(tmp_path, params):
    save_checkpoint(tmp_path, CONFIG, params)
    assert (tmp_path / "model.safetensors").stat().st_size < 2 * sum(w.size for w in params.values()) + 4096


def test_files_are_in_hugging_face_layout(directory):
    config = json.loads((directory / "config.json").read_text())
    assert config["model_type"] == "llama"
    assert config["architectures"] == ["LlamaForCausalLM"]
    with safe_open(directory / "model.safetensors", framework="np") as file:
        assert file.metadata() == {"format": "pt"}
        assert file.get_tensor(Q_PROJ).shape == (24, 12)


def test_saving_replaces_and_leaves_nothing_beside(directory, params):
    save_checkpoint(directory, CONFIG, params)
    assert sorted(path.name for path in directory.iterdir()) == ["config.json", "model.safetensors"]


def test_fields_that_older_and_newer_files_leave_out(tmp_path):
    written = dataclasses.replace(CONFIG, hidden_size=24, num_key_value_heads=4)
    save_checkpoint(tmp_path, written, init_params(written, jax.random.key(0)))
    drop_from_config(tmp_path, "num_key_value_heads", "head_dim", "rope_theta")
    edit_config(tmp_path, rope_parameters={"rope_type": "default", "rope_theta": 77.0})
    config, _ = load_checkpoint(tmp_path)
    assert config == dataclasses.replace(written, rope=Rope(theta=77.0))


def test_unused_tensors_are_ignored(directory):
    edit_weights(directory, lambda weights: weights.update({"rotary.inv_freq": np.ones(3, np.float32)}))
    _, loaded = load_checkpoint(directory)
    assert "rotary.inv_freq" not in loaded


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("read", [load_checkpoint, checkpoint_sha256])
def test_missing_file(directory, name, read):
    (directory / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"There is no .*{name}.* Give "):
        read(directory)


def test_missing_tensor(directory):
    edit_weights(directory, lambda weights: weights.pop(Q_PROJ))
    with pytest.raises(ValueError, match=f"has no tensor '{Q_PROJ}'"):
        load_checkpoint(directory)


def test_wrong_shape(directory):
    edit_weights(directory, lambda weights: weights.update({Q_PROJ: np.ones((12, 24), np.float32)}))
    with pytest.raises(ValueError, match=rf"{Q_PROJ}' of shape \(12, 24\), .* calls for \(24, 12\)"):
        load_checkpoint(directory)


def test_saving_weights_that_do_not_fit(tmp_path, params):
    with pytest.raises(ValueError, match=f"params has no tensor '{Q_PROJ}'"):
        save_checkpoint(tmp_path, CONFIG, {name: w for name, w in params.items() if name != Q_PROJ})
    with pytest.raises(ValueError, match=rf"params has '{Q_PROJ}' of shape \(3,\)"):
        save_checkpoint(tmp_path, CONFIG, params | {Q_PROJ: jnp.ones(3)})


@pytest.mark.parametrize("kept", [0, 5, 200, -4])
def test_truncated_weights(directory, kept):
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"model.safetensors is cut short or damaged .*Copy the file again"):
        load_checkpoint(directory)


def test_without_safetensors(directory, params, monkeypatch):
    for name in ("safetensors", "safetensors.numpy"):
        monkeypatch.setitem(sys.modules, name, None)
    for call in (lambda: load_checkpoint(directory), lambda: save_checkpoint(directory, CONFIG, params)):
        with pytest.raises(ImportError, match=r'pip install "qpaged\[sweep\]"'):
            call()
