"""Static scales in the files of checkpoints."""

import re

import jax
import numpy as np
import pytest
from support.small_sweep import SIZES

from qpaged import CacheScales
from qpaged.models import init_params, load_checkpoint, read_scales, save_checkpoint, write_scales

save_file = pytest.importorskip("safetensors.numpy").save_file

BY_LAYER = CacheScales([0.5, 0.25], [2.0, 4.0])
BY_HEAD = CacheScales([[0.5, 0.25], [1.0, 3.0]], [[2.0, 4.0], [8.0, 16.0]])


def stored(path, tensors):
    save_file({name: np.asarray(scale, np.float32) for name, scale in tensors.items()}, path)
    return path


def same(read, expected):
    np.testing.assert_array_equal(read.key, np.float32(expected.key))
    np.testing.assert_array_equal(read.value, np.float32(expected.value))
    return read.format == expected.format


@pytest.mark.parametrize("scales", [BY_LAYER, BY_HEAD])
@pytest.mark.parametrize("name", ["scales.json", "scales.safetensors"])
def test_scales_are_read_as_they_were_written(tmp_path, scales, name):
    write_scales(tmp_path / name, scales)
    assert same(read_scales(tmp_path / name), scales)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model.layers.{}.self_attn.k_scale", "model.layers.{}.self_attn.v_scale"),
        ("model.layers.{}.self_attn.attn.k_scale", "model.layers.{}.self_attn.attn.v_scale"),
        ("model.layers.{}.self_attn.k_proj.k_scale", "model.layers.{}.self_attn.v_proj.v_scale"),
        ("model.layers.{}.self_attn.qkv_proj.k_scale", "model.layers.{}.self_attn.qkv_proj.v_scale"),
        ("model.layers.{}.self_attn.k_proj.output_scale", "model.layers.{}.self_attn.v_proj.output_scale"),
        (
            "language_model.model.layers.{}.self_attn.k_scale",
            "language_model.model.layers.{}.self_attn.v_scale",
        ),
    ],
)
@pytest.mark.parametrize("shape", [(), (1,)])
def test_scales_have_many_names(tmp_path, key, value, shape):
    tensors = {"model.layers.0.self_attn.q_scale": np.ones(shape), "model.norm.weight": np.ones(3)}
    for layer in range(2):
        tensors[key.format(layer)] = np.full(shape, BY_LAYER.key[layer])
        tensors[value.format(layer)] = np.full(shape, BY_LAYER.value[layer])
    assert same(read_scales(stored(tmp_path / "some.safetensors", tensors)), BY_LAYER)


def test_one_scale_may_be_for_both(tmp_path):
    tensors = {
        "model.layers.0.self_attn.kv_scale": 0.5,
        "model.layers.1.self_attn.kv_scale": 0.25,
        "model.layers.1.self_attn.v_scale": 4.0,
    }
    read = read_scales(stored(tmp_path / "some.safetensors", tensors))
    assert same(read, CacheScales([0.5, 0.25], [0.5, 4.0]))


def test_scales_of_heads_may_have_further_axes(tmp_path):
    names = [f"model.layers.0.self_attn.{side}_scale" for side in "kv"]
    tensors = {name: np.reshape([0.5, 0.25], (2, 1, 1)) for name in names}
    read = read_scales(stored(tmp_path / "some.safetensors", tensors))
    assert same(read, CacheScales([[0.5, 0.25]], [[0.5, 0.25]]))


def test_a_checkpoint_with_scales_is_loaded_and_its_scales_are_read(tmp_path):
    params = init_params(SIZES, jax.random.key(0))
    save_checkpoint(tmp_path, SIZES, params)
    with pytest.raises(
        ValueError, match=re.escape("must have scales of every layer, as model.layers.0.self_attn")
    ):
        read_scales(tmp_path)
    weights = {name: np.asarray(weight) for name, weight in params.items()}
    scales = {
        f"model.layers.{layer}.self_attn.{side}_scale": 0.5 + layer for layer in (0, 1) for side in "kv"
    }
    stored(tmp_path / "model.safetensors", weights | scales)
    assert same(read_scales(tmp_path), CacheScales([0.5, 1.5], [0.5, 1.5]))
    assert load_checkpoint(tmp_path)[1].keys() == params.keys()


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (
            {"model.norm.weight": 1.0},
            "as model.layers.0.self_attn.k_scale, but has none of layers [0] for k; give",
        ),
        (
            {"model.layers.1.self_attn.kv_scale": 1.0},
            "model.layers.0.self_attn.k_scale, but has none of layers [0] for k;",
        ),
        ({"model.layers.0.self_attn.k_scale": 1.0}, "but has none of layers [0] for v;"),
        (
            {"model.layers.0.self_attn.kv_scale": [1.0] * 2, "model.layers.1.self_attn.kv_scale": [1.0] * 3},
            "must have as many k_scale in each layer; copy the file again.",
        ),
        ({"model.layers.0.self_attn.kv_scale": 0.0}, "key must be positive and finite scales"),
    ],
)
def test_tensors_that_are_no_scales_of_a_cache(tmp_path, tensors, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        read_scales(stored(tmp_path / "some.safetensors", tensors))


def test_scales_in_a_dtype_that_cannot_be_read(tmp_path):
    save_file({"model.layers.0.self_attn.k_scale": np.ones(1, np.int8)}, tmp_path / "some.safetensors")
    message = "stores 'model.layers.0.self_attn.k_scale' as I8, but only BF16, F16, F32 can be read."
    with pytest.raises(ValueError, match=message):
        read_scales(tmp_path / "some.safetensors")


def test_two_scales_of_one_layer_are_refused(tmp_path):
    names = "model.layers.0.self_attn.k_scale", "vision.layers.0.self_attn.k_scale"
    path = stored(tmp_path / "two.safetensors", {names[0]: [1.0], names[1]: [0.5]})
    message = "must have one k_scale for each layer, but 'vision.layers.0.self_attn.k_scale' is another one"
    with pytest.raises(ValueError, match=message):
        read_scales(path)


def test_many_missing_layers_are_counted(tmp_path):
    path = stored(tmp_path / "far.safetensors", {"model.layers.999.self_attn.k_scale": [1.0]})
    with pytest.raises(ValueError, match=r"none of layers \[0, 1, 2, 3, 4, 5, 6, 7\] and 991 more for k;"):
        read_scales(path)


def test_files_that_cannot_be_written(tmp_path):
    with pytest.raises(TypeError, match=r"scales must be a qpaged\.CacheScales, but got"):
        write_scales(tmp_path / "scales.json", {"key": 1})
    with pytest.raises(ValueError, match=r"path must end in .json or .safetensors, but came as"):
        write_scales(tmp_path / "scales.npz", BY_LAYER)
    with pytest.raises(
        ValueError, match=r"scales must be for fp8_e4m3 in a safetensors file, .* for fp8_e5m2; write"
    ):
        write_scales(tmp_path / "scales.safetensors", CacheScales([1.0], [1.0], "fp8_e5m2"))
