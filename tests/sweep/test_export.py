"""Choices of formats as ModelOpt and vLLM read them."""

import json

import pytest

import qpaged
from qpaged.sweep.tune._export import MODELOPT, VLLM, modelopt_config, vllm_options

FP8, RAW = ("fp8_e4m3:tensor",) * 2, ("raw",) * 2


def test_modelopt_names_the_format_of_each_layer():
    config = modelopt_config([FP8, ("nvfp4", "nvfp4"), ("fp8_e4m3:tensor", "nvfp4"), RAW])
    assert config["producer"]["name"] == "qpaged"
    assert config["quantization"] == {
        "quant_algo": None,
        "kv_cache_quant_algo": "MIXED_PRECISION",
        "kv_cache_quantized_layers": {
            "model.layers.0.self_attn": {"quant_algo": "FP8"},
            "model.layers.1.self_attn": {"quant_algo": "NVFP4"},
            "model.layers.2.self_attn": {"quant_algo": "FP8_K_NVFP4_V"},
        },
        "kv_cache_schema_version": 1,
    }


@pytest.mark.parametrize(
    ("layers", "algorithm"), [([FP8, FP8], "FP8"), ([FP8, RAW], "MIXED_PRECISION"), ([RAW, RAW], None)]
)
def test_what_modelopt_calls_all_layers(layers, algorithm):
    assert modelopt_config(layers)["quantization"]["kv_cache_quant_algo"] == algorithm


def test_vllm_has_one_format_and_layers_without():
    assert vllm_options([RAW, FP8, RAW]) == {
        "kv_cache_dtype": "fp8_e4m3",
        "kv_cache_dtype_skip_layers": ["0", "2"],
    }
    assert vllm_options([RAW])["kv_cache_dtype"] == "auto"


@pytest.mark.parametrize(
    ("export", "layers", "message"),
    [
        (
            modelopt_config,
            [FP8, ("int8", "int8")],
            "but layer 1 has int8 keys and int8 values .1 of 2 layers",
        ),
        (vllm_options, [("raw", "int8:token")] * 2, "but layer 0 has raw keys and int8:token values .2 of 2"),
        (vllm_options, [FP8, ("nvfp4", "nvfp4")], "one format beside raw, but layers have fp8_e4m3, nvfp4"),
    ],
)
def test_what_an_engine_does_not_have_is_refused(export, layers, message):
    with pytest.raises(ValueError, match=message):
        export(layers)


def test_the_formats_are_installed():
    for pair in (*MODELOPT, *VLLM):
        assert [str(qpaged.get_quantizer(spelling)) for spelling in pair] == list(pair)


SMALL = ("--tokens", "96", "--context", "48", "--page-size", "8", "--quick", "--bits", "16")


@pytest.mark.parametrize(("formats", "status"), [("int8:token", 0), ("int8", 1)])
def test_tune_writes_it_beside_the_choice(command, tmp_path, formats, status):
    out = tmp_path / "chosen.json"
    done = command("tune", *SMALL, "--formats", formats, "--out", out, "--export", "vllm")
    exported = tmp_path / "chosen.vllm.json"
    assert done.status == status and out.exists() and exported.exists() == (status == 0)
    if status:
        assert "--export vllm takes layers in fp8_e4m3:tensor, " in " ".join(done.err.split())
    else:
        assert json.loads(exported.read_text())["kv_cache_dtype"] == "int8_per_token_head"
