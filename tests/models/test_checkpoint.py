"""Checkpoints survive a round trip, and the error for a damaged one says what is wrong with it."""

import dataclasses
import hashlib
import json
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from qpaged.models import (
    DecoderConfig,
    LinearScaling,
    Rope,
    _safetensors,
    checkpoint_sha256,
    load_checkpoint,
    param_shapes,
    parameter_bytes,
    read_config,
    save_checkpoint,
)
from qpaged.models._safetensors import StoredTensor
from qpaged.models.decoder import EMBEDDING, OUTPUT

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
SHAPES = param_shapes(CONFIG)
INDEX = "model.safetensors.index.json"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(0)
    return {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in SHAPES.items()}


@pytest.fixture
def directory(tmp_path, params):
    save_checkpoint(tmp_path / "model", CONFIG, params, dtype=jnp.float32)
    return tmp_path / "model"


@pytest.fixture
def sharded(directory):
    """The same checkpoint in two files with an index."""
    weights = load_file(directory / "model.safetensors")
    names = list(SHAPES)
    shards = {SHARDS[0]: names[:7], SHARDS[1]: names[7:]}
    for shard, part in shards.items():
        save_file({name: weights[name] for name in part}, directory / shard)
    write_index(directory, {name: shard for shard, part in shards.items() for name in part})
    (directory / "model.safetensors").unlink()
    return directory


def write_index(directory, weight_map):
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def read_index(directory):
    return json.loads((directory / INDEX).read_text())["weight_map"]


def edit_config(directory, **changes):
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


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


def test_saving_replaces_a_checkpoint_and_leaves_no_other_file(directory, params):
    save_checkpoint(directory, CONFIG, params)
    assert sorted(path.name for path in directory.iterdir()) == ["config.json", "model.safetensors"]


def test_only_a_plain_llama_can_be_saved(tmp_path, params):
    for other in ({"query_key_norm": True}, {"rope": Rope(5000.0, scaling=LinearScaling(2.0))}):
        with pytest.raises(
            ValueError, match=r"config must be a plain Llama's to be saved.* but came as Deco"
        ):
            save_checkpoint(tmp_path, dataclasses.replace(CONFIG, **other), params)
    assert not list(tmp_path.iterdir())


def test_shards_load_like_one_file(sharded, params):
    config, loaded = load_checkpoint(sharded)
    assert config == CONFIG and loaded.keys() == params.keys()
    for name, weight in params.items():
        np.testing.assert_array_equal(loaded[name], weight)


def test_an_output_matrix_that_is_not_tied_must_be_there(directory):
    edit_weights(directory, lambda weights: weights.pop("lm_head.weight"))
    with pytest.raises(
        ValueError, match=r"no tensor 'lm_head.weight', .* Copy all files of the checkpoint again"
    ):
        load_checkpoint(directory)


def test_a_tied_output_matrix_that_is_the_embedding_is_not_read(directory):
    edit_config(directory, tie_word_embeddings=True)
    edit_weights(directory, lambda weights: weights.update({OUTPUT: weights[EMBEDDING]}))
    assert OUTPUT not in load_checkpoint(directory)[1]


@pytest.mark.parametrize("place", [0, 2, -1])
def test_tied_matrices_are_compared_to_their_end(directory, monkeypatch, place):
    """A piece holds 16 of the 132 values, so the last piece is not whole."""
    monkeypatch.setattr(_safetensors, "PIECE", 64)
    edit_config(directory, tie_word_embeddings=True)

    def edit(weights):
        weights[OUTPUT] = weights[EMBEDDING].copy()
        weights[OUTPUT].flat[16 * place if place > 0 else place] += 1

    edit_weights(directory, edit)
    with pytest.warns(UserWarning, match=r"the stored lm_head.weight is not the embedding"):
        assert not load_checkpoint(directory)[0].tie_word_embeddings


def test_a_tied_output_matrix_that_is_stored_apart_is_read_with_a_warning(directory, params):
    edit_config(directory, tie_word_embeddings=True)
    with pytest.warns(UserWarning, match=r"the stored lm_head.weight is not the embedding"):
        config, loaded = load_checkpoint(directory)
    assert not config.tie_word_embeddings
    np.testing.assert_array_equal(loaded[OUTPUT], params[OUTPUT])


def test_a_tied_checkpoint_may_store_the_output_matrix_alone(directory, params):
    edit_config(directory, tie_word_embeddings=True)
    edit_weights(directory, lambda weights: weights.pop(EMBEDDING))
    np.testing.assert_array_equal(load_checkpoint(directory)[1][EMBEDDING], params[OUTPUT])


def test_weights_that_were_saved_from_a_base_model_are_loaded(directory, params):
    def edit(weights):
        plain = {name.removeprefix("model."): weight for name, weight in weights.items() if name != OUTPUT}
        weights.clear()
        weights.update(plain)

    edit_weights(directory, edit)
    with pytest.raises(ValueError, match=r"has no tensor 'lm_head.weight'"):
        load_checkpoint(directory)  # a base model has none
    edit_config(directory, tie_word_embeddings=True)
    _, loaded = load_checkpoint(directory)
    np.testing.assert_array_equal(loaded[EMBEDDING], params[EMBEDDING])


@pytest.mark.parametrize(
    ("model", "output"),
    [("language_model.model.", "language_model.lm_head."), ("model.language_model.", "lm_head.")],
)
def test_a_decoder_beside_a_vision_tower_is_loaded(directory, params, model, output):
    def edit(weights):
        named = {
            name.replace("model.", model, 1).replace("lm_head.", output): w for name, w in weights.items()
        }
        weights.clear()
        weights.update(named | {"vision_tower.layers.0.bias": np.ones(3, np.float32)})

    edit_weights(directory, edit)
    config, loaded = load_checkpoint(directory)
    assert config == CONFIG and loaded.keys() == params.keys()
    np.testing.assert_array_equal(loaded[Q_PROJ], params[Q_PROJ])


def test_parameter_bytes_are_those_of_the_loaded_weights(sharded):
    _, loaded = load_checkpoint(sharded)
    assert parameter_bytes(sharded) == sum(weight.nbytes for weight in loaded.values())
    shard = sharded / SHARDS[0]
    save_file({name: w.astype(jnp.bfloat16) for name, w in load_file(shard).items()}, shard)
    _, narrower = load_checkpoint(sharded)
    assert parameter_bytes(sharded) == sum(weight.nbytes for weight in narrower.values())
    edit_config(sharded, tie_word_embeddings=True)
    assert parameter_bytes(sharded / "config.json") < sum(weight.nbytes for weight in narrower.values())


def test_there_are_no_parameter_bytes_without_weights(directory):
    (directory / "model.safetensors").unlink()
    assert parameter_bytes(directory) is None
    assert read_config(directory) == CONFIG


def test_sha256_is_of_every_file_that_is_read(sharded):
    """It is the output of `sha256sum config.json model*.safetensors | sha256sum`."""
    names = ["config.json", *SHARDS]
    sums = [(hashlib.sha256((sharded / name).read_bytes()).hexdigest(), name) for name in names]
    lines = "".join(f"{digest}  {name}\n" for digest, name in sums)
    before = checkpoint_sha256(sharded)
    assert before == hashlib.sha256(lines.encode()).hexdigest()
    for name in names:
        (sharded / name).write_bytes((sharded / name).read_bytes() + b" ")
        before, after = checkpoint_sha256(sharded), before
        assert before != after


def test_unused_tensors_are_not_read(directory, monkeypatch):
    """They are buffers that follow from the configuration, and tensors outside of the decoder."""
    names = ["model.layers.0.self_attn.rotary_emb.inv_freq", "classifier.weight"]
    edit_weights(directory, lambda w: w.update({name: np.ones(3, np.float32) for name in names}))
    read, original = [], StoredTensor.read
    monkeypatch.setattr(
        StoredTensor, "read", lambda self, dtype: read.append(self.name) or original(self, dtype)
    )
    load_checkpoint(directory)
    assert read == list(SHAPES)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.1.self_attn.q_proj.bias",
        "model.layers.0.mlp.experts.3.up.weight",
        "model.layers.2.input_layernorm.weight",  # of a layer that the configuration does not have
        "lm_head.bias",
    ],
)
def test_a_tensor_that_the_configuration_has_no_use_for_is_refused(directory, name):
    edit_weights(directory, lambda weights: weights.update({name: np.ones(3, np.float32)}))
    with pytest.raises(ValueError, match=f"has the tensor '{name}', which config.json .* does not call for"):
        load_checkpoint(directory)


def test_weights_of_another_dtype_are_refused(directory):
    edit_weights(directory, lambda weights: weights.update({Q_PROJ: np.ones(SHAPES[Q_PROJ], np.int8)}))
    with pytest.raises(ValueError, match=f"stores '{Q_PROJ}' as I8, but only BF16, F16, F32 can be loaded"):
        load_checkpoint(directory)


def test_a_missing_shard_is_named(sharded):
    (sharded / SHARDS[1]).unlink()
    for read in (load_checkpoint, parameter_bytes, checkpoint_sha256):
        with pytest.raises(FileNotFoundError, match=f"lacks {SHARDS[1]}, which {INDEX} names. Copy the miss"):
            read(sharded)


def test_a_half_written_shard_is_named(sharded):
    path = sharded / SHARDS[1]
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=f"{SHARDS[1]} is cut short or damaged .* Copy the file again"):
        load_checkpoint(sharded)


@pytest.mark.parametrize("name", [Q_PROJ, "model.layers.1.nowhere"])
def test_an_index_must_name_the_shard_of_each_tensor(sharded, name):
    write_index(sharded, read_index(sharded) | {name: SHARDS[0]})
    with pytest.raises(
        ValueError, match=f"{INDEX} says that {SHARDS[0]} has the tensor '{name}', but it has"
    ):
        load_checkpoint(sharded)


def test_a_tensor_that_no_shard_has_is_named(sharded):
    weights = load_file(sharded / SHARDS[1])
    del weights[Q_PROJ]
    save_file(weights, sharded / SHARDS[1])
    write_index(sharded, {name: shard for name, shard in read_index(sharded).items() if name != Q_PROJ})
    with pytest.raises(ValueError, match=f"has no tensor '{Q_PROJ}'"):
        load_checkpoint(sharded)


@pytest.mark.parametrize("index", ["{}", "[]", '{"weight_map": {}}', '{"weight_map": {"a": 1}}'])
def test_a_malformed_index_is_refused(sharded, index):
    (sharded / INDEX).write_text(index)
    with pytest.raises(
        ValueError, match=f"{INDEX} has no weight_map of tensors to shards. Copy the file again"
    ):
        load_checkpoint(sharded)


def test_a_truncated_index_is_refused(sharded):
    (sharded / INDEX).write_text('{"weight_map": {')
    with pytest.raises(ValueError, match=rf"{INDEX} is not valid JSON \(.*\). Copy the file again"):
        load_checkpoint(sharded)


def test_pickled_weights_are_refused(directory):
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"in pytorch_model.bin, but only safetensors .* save_pretrained"):
        load_checkpoint(directory)


@pytest.mark.parametrize("name", ["consolidated.safetensors", "model-00001-of-00002.safetensors"])
def test_weights_under_another_name_are_named(directory, name):
    (directory / "model.safetensors").rename(directory / name)
    with pytest.raises(FileNotFoundError, match=rf"has {name}, but neither model.safetensors nor {INDEX}"):
        load_checkpoint(directory)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("read", [load_checkpoint, checkpoint_sha256])
def test_a_missing_file_is_named(directory, name, read):
    (directory / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"There is no .*{name}.* Give "):
        read(directory)


def test_a_missing_tensor_is_named(directory):
    edit_weights(directory, lambda weights: weights.pop(Q_PROJ))
    with pytest.raises(ValueError, match=f"has no tensor '{Q_PROJ}'"):
        load_checkpoint(directory)


def test_a_tensor_of_another_shape_is_refused(directory):
    edit_weights(directory, lambda weights: weights.update({Q_PROJ: np.ones((12, 24), np.float32)}))
    with pytest.raises(ValueError, match=rf"{Q_PROJ}' of shape \(12, 24\), .* calls for \(24, 12\)"):
        load_checkpoint(directory)


def test_weights_that_do_not_fit_are_not_saved(tmp_path, params):
    with pytest.raises(ValueError, match=f"params has no tensor '{Q_PROJ}'"):
        save_checkpoint(tmp_path, CONFIG, {name: w for name, w in params.items() if name != Q_PROJ})
    with pytest.raises(ValueError, match=rf"params has '{Q_PROJ}' of shape \(3,\)"):
        save_checkpoint(tmp_path, CONFIG, params | {Q_PROJ: jnp.ones(3)})


@pytest.mark.parametrize("kept", [0, 5, 200, -4])
def test_truncated_weights_are_refused(directory, kept):
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"model.safetensors is cut short or damaged .*Copy the file again"):
        load_checkpoint(directory)


def test_the_error_without_safetensors_says_what_to_install(directory, params, monkeypatch):
    for name in ("safetensors", "safetensors.numpy"):
        monkeypatch.setitem(sys.modules, name, None)
    for call in (lambda: load_checkpoint(directory), lambda: save_checkpoint(directory, CONFIG, params)):
        with pytest.raises(ImportError, match=r'pip install -e "\.\[sweep\]" in'):
            call()


@pytest.mark.parametrize("shard", ["../model.safetensors", "/etc/passwd", "a/b.safetensors"])
def test_shards_outside_of_the_directory_are_refused(directory, shard):
    (directory / "model.safetensors").rename(directory / "other.safetensors")
    write_index(directory, {"model.norm.weight": shard})
    with pytest.raises(ValueError, match="must name files beside it, but names"):
        load_checkpoint(directory)


def test_the_name_of_a_model_on_the_hub_is_told_how_to_become_a_directory():
    with pytest.raises(FileNotFoundError, match=r"hf download meta-llama/Llama-3.1-8B --local-dir DIR"):
        load_checkpoint("meta-llama/Llama-3.1-8B")
