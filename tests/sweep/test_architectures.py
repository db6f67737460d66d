"""Tests of ``qpaged sweep`` on a small, random checkpoint of every architecture."""

import json
import os

import numpy as np
import pytest
import safetensors.numpy

from qpaged.models import param_shapes, read_config

SIZES = {
    "vocab_size": 256, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64,
    "rope_theta": 10000.0, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
GEMMA = {"hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 16, "sliding_window": 8}
ARCHITECTURES = {
    "llama": {},
    "llama3": {"model_type": "llama", "rope_scaling": LLAMA3},
    "mistral": {"sliding_window": 8},
    "qwen2": {},
    "qwen3": {},
    "gemma2": GEMMA | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    "gemma3_text": GEMMA | {"rope_local_base_freq": 1000.0, "sliding_window_pattern": 2},
    "phi3": {},
}
TESTED = [pytest.param("gemma2", marks=pytest.mark.long)]
if os.environ.get("EVERY_MODEL"):
    TESTED = list(ARCHITECTURES)


@pytest.mark.parametrize("architecture", TESTED)
def test_it_is_swept(architecture, tmp_path, command):
    config = {"model_type": architecture} | SIZES | ARCHITECTURES[architecture]
    (tmp_path / "config.json").write_text(json.dumps(config))
    rng = np.random.default_rng(0)
    weights = {
        name: rng.normal(scale=1 if len(shape) == 1 else 0.5, size=shape).astype(np.float32)
        for name, shape in param_shapes(read_config(tmp_path)).items()
    }
    safetensors.numpy.save_file(weights, tmp_path / "model.safetensors")
    result = command(
        "sweep", "--tokens", 48, "--context", 24, "--formats", "int4:token", "--json", model=tmp_path
    )
    assert result.status == 0, result.err
    results = json.loads(result.out)
    plain, int4 = results["runs"]
    assert results["model"]["architecture"] == config["model_type"]
    assert 0 < int4["kl_mean"] < 5 and plain["kl_mean"] == 0
    assert 0.02 < min(int4["attention_error_by_layer"]) < int4["attention_error"] < 0.5
