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

from qpaged.models import LlamaConfig, init_params, load_checkpoint, save_checkpoint

CONFIG = LlamaConfig(
    vocab_size=11,
    hidden_size=12,
    intermediate_size=20,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=6,
    rope_theta=5000.0,
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


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_weights_load_as_float32(tmp_path, params, dtype):
    save_checkpoint(tmp_path, CONFIG, params, dtype)
    _, loaded = load_checkpoint(tmp_path)
    for name, weight in params.items():
        assert loaded[name].dtype == jnp.float32
        np.testing.assert_array_equal(loaded[name], weight.astype(dtype).astype(jnp.float32))


def test_weights_are_stored_as_bfloat16_and_load_so_on_request(tmp_path, params):
    save_checkpoint(tmp_path, CONFIG, params)
    _, loaded = load_checkpoint(tmp_path, jnp.bfloat16)
    assert {weight.dtype for weight in loaded.values()} == {jnp.dtype(jnp.bfloat16)}
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
    assert config == dataclasses.replace(written, rope_theta=77.0)


def test_unused_tensors_are_ignored(directory):
    edit_weights(directory, lambda weights: weights.update({"rotary.inv_freq": np.ones(3, np.float32)}))
    _, loaded = load_checkpoint(directory)
    assert "rotary.inv_freq" not in loaded


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_missing_file(directory, name):
    (directory / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"There is no .*{name}. Give a directory with"):
        load_checkpoint(directory)


def test_checkpoint_in_several_files(directory):
    (directory / "model.safetensors").rename(directory / "model-00001-of-00001.safetensors")
    (directory / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match=r"in several files.* single model.safetensors can be loaded"):
        load_checkpoint(directory)


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


@pytest.mark.parametrize("model_type", ["gemma", None])
def test_unexpected_model_type(directory, model_type):
    edit_config(directory, model_type=model_type)
    with pytest.raises(ValueError, match=rf'says model_type {model_type!r}, but only "llama"'):
        load_checkpoint(directory)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_act", "gelu"),
        ("attention_bias", True),
        ("mlp_bias", True),
        ("rope_scaling", {"rope_type": "llama3"}),
    ],
)
def test_variants_that_compute_something_else(directory, field, value):
    edit_config(directory, **{field: value})
    with pytest.raises(ValueError, match=f"says {field} = .*is supported"):
        load_checkpoint(directory)


def test_scaled_rotary_positions_of_newer_files(directory):
    edit_config(directory, rope_parameters={"rope_type": "llama3", "rope_theta": 10000.0})
    with pytest.raises(ValueError, match="says rope_type 'llama3', but only \"default\""):
        load_checkpoint(directory)


def test_configuration_without_a_size(directory):
    drop_from_config(directory, "intermediate_size")
    with pytest.raises(ValueError, match=r"lacks a size of the model .*intermediate_size"):
        load_checkpoint(directory)


def test_truncated_configuration(directory):
    path = directory / "config.json"
    path.write_text(path.read_text()[:20])
    with pytest.raises(ValueError, match=r"config.json is not valid JSON .*Copy the file again"):
        load_checkpoint(directory)


@pytest.mark.parametrize("kept", [0, 5, 200, -4])
def test_truncated_weights(directory, kept):
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"model.safetensors is cut short or damaged .*Copy the file again"):
        load_checkpoint(directory)


def test_without_safetensors(directory, params, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    for call in (lambda: load_checkpoint(directory), lambda: save_checkpoint(directory, CONFIG, params)):
        with pytest.raises(ImportError, match=r'pip install "qpaged\[sweep\]"'):
            call()
