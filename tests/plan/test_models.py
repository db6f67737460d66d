"""What ``qpaged plan`` reads of models of every kind: the sizes of their caches, and the bytes of weights."""

import json
import re

import pytest

from qpaged.models import CacheSizes, read_cache_sizes, weights_bytes


def edit(model, **fields):
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


COUNT = 2 * 64 * 64 + 2 * (4 * 64 * 512 - 2 * 64 * 256 + 3 * 64 * 64 + 2 * 64) + 64
"""Weights of the model: two matrices of the vocabulary; each layer's attention, MLP and norms; a norm."""


@pytest.mark.parametrize(("dtype", "itemsize"), [(None, 2), ("float16", 2), ("float32", 4)])
def test_the_weights_of_a_configuration_alone_are_computed(model, dtype, itemsize):
    edit(model, torch_dtype=dtype)
    assert weights_bytes(model) == (COUNT * itemsize, f"computed from config.json, as {dtype or 'bfloat16'}")


@pytest.mark.parametrize(
    ("names", "source"),
    [
        (["model.safetensors", "pytorch_model.bin"], "the size of model.safetensors"),
        (["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"], "2 files like model"),
        (
            ["model.safetensors", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"],
            "the size of model.safetensors",
        ),
        (["model.safetensors", "model.fp16.safetensors"], "the size of model.safetensors"),
        (
            ["model-00001-of-00001.safetensors", "consolidated.safetensors"],
            "the size of model-00001-of-00001",
        ),
        (["consolidated.00.pth", "consolidated.01.pth"], "2 files like consolidated.00.pth"),
        (["consolidated.safetensors"], "the size of consolidated.safetensors"),
        (["pytorch_model-00001-of-00001.bin"], "the size of pytorch_model-00001-of-00001.bin"),
        (["consolidated.00.pth"], "the size of consolidated.00.pth"),
    ],
)
def test_weights_of_any_kind_count_as_their_files(command, model, names, source):
    for name in names:
        (model / name).write_bytes(bytes(100 * 1024))
    status, out, _ = command("--memory", "1MiB", "--formats", "int8")
    assert status == 0 and source in out
    assert f"the weights take {200 if source.startswith('2') else 100}.00 KiB" in out


def test_the_shards_of_an_index_alone_count(model):
    index = {"weight_map": {"a": "first.safetensors", "b": "second.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    for name in ("first.safetensors", "second.safetensors", "model-00001-of-00001.safetensors"):
        (model / name).write_bytes(bytes(1024))
    assert weights_bytes(model) == (2048, "the size of 2 files like first.safetensors")


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 16060617592\n"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {"model.safetensors": POINTER},
            "holds a pointer of Git LFS where weights .* with git lfs pull, or give",
        ),
        ({"model.safetensors": b""}, "model.safetensors holds nothing where weights should be"),
        ({"pytorch_model.bin": POINTER}, "pytorch_model.bin holds a pointer of Git LFS"),
        (
            {
                "model-00001-of-00004.safetensors": b"weights",
                "model.safetensors.index.json": b'{"weight_map": {"a": "model-00001-of-00004.safetensors", '
                b'"b": "model-00002-of-00004.safetensors"}}',
            },
            "lacks model-00002-of-00004.safetensors, which model.safetensors.index.json names",
        ),
        (
            {"model-00001-of-00004.safetensors": b"weights"},
            "must have as many files like model-00001-of-00004.safetensors as their names say, but has 1.",
        ),
        (
            {"pytorch_model-00001-of-00002.bin": b"weights", "pytorch_model-00001-of-00001.bin": b"weights"},
            "like pytorch_model-00001-of-00001.bin as their names say, but has 2",
        ),
    ],
)
def test_files_that_are_not_all_weights_are_refused(command, model, files, message):
    for name, data in files.items():
        (model / name).write_bytes(data)
    status, out, err = command("--memory", "1MiB")
    assert (status, out) == (2, "") and re.search(message, err)


def test_a_directory_is_not_taken_for_a_file_of_weights(model):
    (model / "model.safetensors").mkdir()
    (model / "pytorch_model.bin").mkdir()
    assert weights_bytes(model) == (COUNT * 2, "computed from config.json, as bfloat16")


@pytest.mark.parametrize("dtype", ["object", "U8", "bool", "of tomorrow"])
def test_weights_of_a_dtype_that_is_none_of_numbers_are_asked_for(command, model, dtype):
    edit(model, torch_dtype=dtype)
    status, _, err = command("--memory", "1MiB")
    assert status == 2 and dtype in err and "--weights 16GB" in err


def test_a_dtype_may_stand_in_the_text_config_alone(model):
    sizes = json.loads((model / "config.json").read_text())
    sizes.pop("model_type")
    edit(model, model_type="gemma3", text_config=sizes | {"dtype": "float32"})
    as_float32, source = weights_bytes(model)
    assert source == "computed from config.json, as float32"
    edit(model, torch_dtype="bfloat16")
    assert weights_bytes(model) == (as_float32 // 2, "computed from config.json, as bfloat16")


@pytest.mark.parametrize(
    ("fields", "sizes"),
    [
        # As the files of these models: what is at its family's default is not said.
        (
            {
                "model_type": "llava",
                "text_config": {
                    "model_type": "mistral",
                    "hidden_size": 4096,
                    "num_attention_heads": 32,
                    "num_hidden_layers": 32,
                },
            },
            (32, 8, 128, 131072),
        ),
        (
            {
                "model_type": "paligemma",
                "text_config": {"model_type": "gemma2", "hidden_size": 2304, "num_hidden_layers": 26},
            },
            (26, 4, 256, 8192),
        ),
        (
            {"model_type": "gemma3", "text_config": {"hidden_size": 64, "num_hidden_layers": 3}},
            (3, 4, 256, 131072),
        ),
        (
            {
                "model_type": "of tomorrow",
                "hidden_size": 64,
                "num_attention_heads": 4,
                "num_key_value_heads": 1,
                "num_hidden_layers": 2,
                "layer_types": ["sliding_attention", "full_attention"],
            },
            (2, 1, 16, 2048),
        ),
        (
            {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2},
            (2, 4, 16, 2048),
        ),
        (
            {
                "model_type": "qwen2",
                "hidden_size": 64,
                "num_attention_heads": 4,
                "num_hidden_layers": 2,
                "rope_theta": 1e6,
                "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
            },
            (2, 4, 16, 131072),
        ),
    ],
    ids=lambda value: value["model_type"] if isinstance(value, dict) else None,
)
def test_sizes_that_a_file_leaves_out_are_those_of_its_text_models_family(tmp_path, fields, sizes):
    (tmp_path / "config.json").write_text(json.dumps(fields))
    assert read_cache_sizes(tmp_path) == CacheSizes(*sizes)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"model_type": "falcon", "multi_query": True, "num_kv_heads": 1, "num_key_value_heads": None},
            "it lacks num_key_value_heads, which a model of type falcon may count in another way",
        ),
        (
            {"layer_types": ["linear_attention", "full_attention"]},
            "it says linear_attention, so some layers have no",
        ),
        (
            {"full_attention_interval": 4},
            "it says full_attention_interval, so some layers have no keys and values",
        ),
        ({"attn_layer_period": 8, "attn_layer_offset": 4}, "it says attn_layer_period, so some layers"),
        ({"num_kv_shared_layers": 1}, "it says num_kv_shared_layers, so some layers"),
    ],
)
def test_heads_and_layers_that_cannot_be_told_are_not_counted(command, model, fields, message):
    edit(model, **fields)
    status, out, err = command("--memory", "1MiB", "--weights", "1KiB")
    assert (status, out) == (2, "") and message in err


@pytest.mark.parametrize(
    "fields",
    [
        {"model_type": "mixtral", "num_local_experts": 8},
        {"model_type": "qwen3_moe"},
        {"quantization_config": {"quant_method": "fp8"}},
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
        {"rope_scaling": {"rope_type": "of tomorrow"}},
        {"hidden_act": "relu"},
    ],
    ids=str,
)
def test_models_that_cannot_be_loaded_are_planned(command, model, fields):
    edit(model, **fields)
    status, out, _ = command("--memory", "1MiB", "--formats", "int8", "--weights", "48KiB")
    assert status == 0 and "2 layers of 4 KV heads of 64" in out


def test_weights_of_fp8_are_computed(model):
    whole, _ = weights_bytes(model)
    edit(model, quantization_config={"quant_method": "fp8"})
    count, source = weights_bytes(model)
    assert whole / 2 < count < whole
    assert source.startswith("computed from config.json, as fp8, and ") and source.endswith(
        "outside of layers"
    )


def test_weights_that_cannot_be_computed_are_asked_for(command, model):
    edit(model, model_type="mamba")
    status, _, err = command("--memory", "1MiB", "--formats", "int8")
    assert (
        status == 2
        and "has no weights, and their bytes cannot be computed (" in err
        and "--weights 16GB" in err
    )


def test_a_cache_of_latents_is_not_counted(command, model):
    edit(model, model_type="deepseek_v3", kv_lora_rank=512)
    status, _, err = command("--memory", "1MiB", "--weights", "1KiB")
    assert status == 2 and "config.json: it has kv_lora_rank (MLA). qpaged plan cannot count" in err
