"""Each family's config.json is read as the decoder that it describes; the rest is refused by name."""

import dataclasses
import json
import re

import numpy as np
import pytest

from qpaged.models import (
    AttentionOptions,
    DecoderConfig,
    Experts,
    LinearScaling,
    LongRopeScaling,
    Rope,
    YarnScaling,
    read_config,
)
from qpaged.models.families import FAMILIES, decoder_config

SIZES = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
FULL, SLIDING = "full_attention", "sliding_attention"
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LONGROPE = {"type": "longrope", "short_factor": [1.0, 1.5, 2, 3], "long_factor": [2, 4, 8, 16.0]}
PHI3_LONG = {"max_position_embeddings": 400, "original_max_position_embeddings": 100}


def config(model_type, **fields):
    return decoder_config(SIZES | {"model_type": model_type} | fields)


def changed(model_type, **fields):
    """Return the fields of `DecoderConfig` in which a model differs from a Llama of the same sizes."""
    model = dataclasses.asdict(config(model_type, **fields))
    llama = dataclasses.asdict(config("llama"))
    assert model.pop("model_type") == model_type
    return {name: value for name, value in model.items() if value != llama[name]}


def windows(model_type, **fields):
    """Return the sliding window of each layer."""
    model = config(model_type, **fields)
    return [model.attention(layer).sliding_window for layer in range(model.num_hidden_layers)]


def test_a_llama_needs_only_its_sizes():
    assert config("llama") == DecoderConfig(**SIZES, rms_norm_eps=1e-6)


GEMMA = {
    "sandwich_norms": True,
    "unit_offset": True,
    "scale_embeddings": True,
    "tie_word_embeddings": True,
    "hidden_act": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256.0,
    "sliding_window": 4096,
}


@pytest.mark.parametrize(
    ("model_type", "fields", "expected"),
    [
        ("llama", {"attention_bias": True}, {"attention_bias": True, "output_bias": True}),
        ("llama", {"mlp_bias": True}, {"mlp_bias": True}),
        ("mistral", {"sliding_window": None}, {"max_position_embeddings": 131072}),
        ("qwen2", {}, {"attention_bias": True, "max_position_embeddings": 32768}),
        ("qwen3", {}, {"query_key_norm": True, "max_position_embeddings": 32768}),
        (
            "gemma2",
            {},
            GEMMA
            | {"layer_types": (SLIDING, FULL) * 3, "max_position_embeddings": 8192}
            | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
        ),
        (
            "gemma3_text",
            {},
            GEMMA
            | {"layer_types": (SLIDING,) * 5 + (FULL,), "max_position_embeddings": 131072}
            | {"query_key_norm": True, "rope": vars(Rope(1e6)), "sliding_rope": vars(Rope(1e4))},
        ),
        (
            "mixtral",
            {},
            {"experts": vars(Experts(8, 2, True)), "rms_norm_eps": 1e-5, "rope": vars(Rope(1e6))}
            | {"max_position_embeddings": 131072},
        ),
        (
            "qwen3_moe",
            {"num_experts_per_tok": 4},
            {"experts": vars(Experts(128, 4, False)), "intermediate_size": 768, "query_key_norm": True}
            | {"max_position_embeddings": 32768},
        ),
        (
            "phi3",
            {},
            {"fused_projections": True, "rms_norm_eps": 1e-5, "max_position_embeddings": 4096},
        ),
    ],
)
def test_a_family_has_its_own_defaults_and_features(model_type, fields, expected):
    assert changed(model_type, **fields) == expected


@pytest.mark.parametrize(
    ("model_type", "fields", "expected"),
    [
        ("llama", {}, [None] * 6),
        ("mistral", {}, [4096] * 6),
        ("mistral", {"sliding_window": 5}, [5] * 6),
        ("mistral", {"sliding_window": None}, [None] * 6),
        ("mixtral", {}, [None] * 6),
        ("mixtral", {"sliding_window": 5}, [5] * 6),
        ("qwen3_moe", {"sliding_window": 5, "max_window_layers": 2}, [None] * 6),
        ("phi3", {}, [None] * 6),
        ("phi3", {"sliding_window": 5}, [5] * 6),
        ("qwen2", {"sliding_window": 5, "max_window_layers": 2}, [None] * 6),
        (
            "qwen2",
            {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2},
            [None] * 2 + [5] * 4,
        ),
        ("qwen3", {"use_sliding_window": True, "sliding_window": None}, [None] * 6),
        (
            "qwen3",
            {"use_sliding_window": True, "sliding_window": 5, "layer_types": [SLIDING, FULL, FULL] * 2},
            [5, None, None] * 2,
        ),
        ("gemma2", {"sliding_window": 5}, [5, None] * 3),
        ("gemma3_text", {"sliding_window": 5, "sliding_window_pattern": 3}, [5, 5, None] * 2),
        ("gemma3_text", {"sliding_window": 5, "layer_types": [FULL] * 6}, [None] * 6),
    ],
)
def test_layers_have_the_windows_of_their_family(model_type, fields, expected):
    assert windows(model_type, **fields) == expected


def test_attention_options_follow_from_the_layers_type():
    gemma = config("gemma2", query_pre_attn_scalar=64, attn_logit_softcapping=20.0, sliding_window=5)
    assert gemma.attention(0) == AttentionOptions(1 / 8, 5, 20.0)
    assert gemma.attention(1) == AttentionOptions(1 / 8, None, 20.0)
    assert config("llama").attention(0) == AttentionOptions(8**-0.5)


def test_null_is_not_the_default():
    """A cap that is null is no cap, though the default is a cap."""
    model = config("gemma2", attn_logit_softcapping=None, final_logit_softcapping=None)
    assert (model.attn_logit_softcapping, model.final_logit_softcapping) == (None, None)


def test_missing_sizes_follow_from_others():
    fields = {name: size for name, size in SIZES.items() if name not in ("num_key_value_heads", "head_dim")}
    model = decoder_config(fields | {"model_type": "llama", "head_dim": None})
    assert (model.num_key_value_heads, model.head_dim) == (4, 8)


def test_a_gemma3_of_text_and_images_is_read_as_its_text_part():
    """Real files leave out many of the text part's sizes."""
    text = {name: SIZES[name] for name in ("hidden_size", "intermediate_size", "num_hidden_layers")}
    model = decoder_config({"model_type": "gemma3", "text_config": text | {"sliding_window": 5}})
    sizes = (model.vocab_size, model.num_attention_heads, model.num_key_value_heads, model.head_dim)
    assert sizes == (262208, 8, 4, 256)
    assert model.attention(0).sliding_window == 5


@pytest.mark.parametrize(
    ("model_type", "older", "newer"),
    [
        ("llama", {"rope_theta": 7e4}, {"rope_theta": 7e4, "rope_type": "default"}),
        ("llama", {"rope_theta": 7e4, "rope_scaling": LLAMA3}, LLAMA3 | {"rope_theta": 7e4}),
        (
            "phi3",
            PHI3_LONG | {"rope_scaling": LONGROPE},
            LONGROPE | {"rope_type": "longrope", "rope_theta": 1e4},
        ),
        (
            "phi3",
            {"partial_rotary_factor": 0.5},
            {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
        ),
        (
            "gemma3_text",
            {"rope_theta": 7e5, "rope_local_base_freq": 70, "rope_scaling": {"type": "linear", "factor": 8}},
            {
                FULL: {"rope_type": "linear", "factor": 8.0, "rope_theta": 7e5},
                SLIDING: {"rope_type": "default", "rope_theta": 70.0},
            },
        ),
        ("gemma2", {"rope_theta": 7e4}, {FULL: {"rope_theta": 7e4}, SLIDING: {"rope_theta": 7e4}}),
    ],
)
def test_older_and_newer_files_describe_the_same_model(model_type, older, newer):
    kept = {name: value for name, value in older.items() if not name.startswith(("rope", "partial"))}
    model = config(model_type, **older)
    assert model == config(model_type, **kept, rope_parameters=newer)
    assert model.rope != config(model_type).rope  # the fields change something


def test_a_scaling_that_was_added_to_a_newer_file_counts():
    parameters = {"rope_type": "default", "rope_theta": 1e6}
    linear = {"rope_type": "linear", "factor": 4.0}
    assert config("llama", rope_parameters=parameters, rope_scaling=linear).rope == Rope(
        1e6, scaling=LinearScaling(4.0)
    )
    assert config("llama", rope_parameters=parameters, rope_scaling=None).rope == Rope(1e6)
    yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    both = config("llama", rope_parameters={"rope_theta": 1e6}, rope_scaling=yarn)
    assert isinstance(both.rope.scaling, YarnScaling)


def test_longrope_has_the_factors_of_one_context_at_a_time():
    short = config("phi3", **PHI3_LONG, rope_scaling=LONGROPE)
    assert short.max_position_embeddings == 100
    assert short.for_context(100) is short
    long = short.for_context(101)
    frequencies = Rope().frequencies(8)
    assert long.max_position_embeddings == 400
    np.testing.assert_allclose(short.rope.frequencies(8), frequencies / [1, 1.5, 2, 3], rtol=1e-6)
    np.testing.assert_allclose(long.rope.frequencies(8), frequencies / [2, 4, 8, 16], rtol=1e-6)
    amplitude = (1 + np.log(4) / np.log(100)) ** 0.5
    assert short.rope.scaling.amplitude == long.rope.scaling.amplitude == pytest.approx(amplitude)
    with pytest.raises(ValueError, match=r"length must be at most 400, .* came as 401"):
        short.for_context(401)


def test_longrope_may_have_an_amplitude_of_its_own():
    model = config("phi3", **PHI3_LONG, rope_scaling=LONGROPE | {"attention_factor": 1.25})
    assert isinstance(model.rope.scaling, LongRopeScaling) and model.rope.scaling.amplitude == 1.25


def test_other_models_are_the_same_for_every_context():
    llama = config("llama")
    assert llama.for_context(2048) is llama
    with pytest.raises(ValueError, match=r"length must be at most 2,048"):
        llama.for_context(2049)


def test_a_configuration_is_hashable():
    assert len({config("gemma2"), config("gemma2"), config("phi3", rope_scaling=LONGROPE)}) == 2


def test_an_unknown_family_is_refused():
    known = ", ".join(sorted([*FAMILIES, "gemma3"]))
    for model_type in ("mamba", "qwen2_moe", ["llama"]):
        with pytest.raises(ValueError, match=re.escape(f"model_type {model_type!r}, but only {known} can")):
            config(model_type)
    with pytest.raises(ValueError, match=r"it lacks model_type\. Copy the file again"):
        config(None)


@pytest.mark.parametrize(
    ("model_type", "fields", "message"),
    [
        ("llama", {"hidden_act": "relu"}, "hidden_act = 'relu', but only silu and gelu_pytorch_tanh"),
        ("gemma2", {"hidden_activation": None}, "hidden_activation = None, but only"),
        (
            "llama",
            {"rope_scaling": {"type": "ntk"}},
            "rope_type 'ntk', but only default, dynamic, linear",
        ),
        (
            "llama",
            {"rope_scaling": {"rope_type": "yarn"}},
            "factor must be a positive number that float32 holds, but came",
        ),
        ("llama", {"rope_parameters": {"rope_type": ["linear"]}}, r"rope_type \['linear'\], but only"),
        (
            "llama",
            {"sliding_window": 5},
            "sliding_window must be absent for a model of type llama, but came as 5",
        ),
        ("mistral", {"layer_types": [SLIDING] * 6}, "layer_types must be absent for a model of type mistral"),
        (
            "gemma3_text",
            {"use_bidirectional_attention": True},
            "use_bidirectional_attention must be absent or false for .* as True",
        ),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping must be absent .* as 50.0"),
        ("qwen2", {"layer_types": [FULL, "linear_attention"] * 3}, "layer_types must be a list of full_att"),
        (
            "qwen2",
            {"layer_types": FULL},
            "layer_types must be a list of full_attention and sliding_attention",
        ),
        ("qwen2", {"layer_types": [FULL] * 5}, "one for each of the 6 layers, but has 5"),
        ("qwen2", {"layer_types": [SLIDING] * 6}, "sliding_window must be a whole number .* came as None"),
        ("mixtral", {"layer_types": [FULL] * 6}, "layer_types must be absent for a model of type mixtral"),
        ("mixtral", {"norm_topk_prob": False}, "norm_topk_prob must be absent or true for .* came as False"),
        (
            "qwen3_moe",
            {"mlp_only_layers": [0]},
            r"mlp_only_layers must be absent or \[\] for a model of type qwen3_moe, but came as \[0\]",
        ),
        ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step must be absent or 1 .* came as 2"),
        ("qwen3_moe", {"use_sliding_window": True}, "use_sliding_window must be absent or false .* as True"),
        (
            "qwen3_moe",
            {"layer_types": [FULL] * 6},
            "layer_types must be absent for a model of type qwen3_moe",
        ),
        (
            "qwen3_moe",
            {"quantization_config": {"quant_method": "fp8"}},
            r"weights are quantized \(fp8, as quantization_config says\), .* Choose the checkpoint that",
        ),
        (
            "llama",
            {"quantization_config": {"quant_method": "gptq"}},
            r"weights are quantized \(gptq, as quantization_config says\)",
        ),
    ],
)
def test_features_that_are_not_implemented_are_refused(model_type, fields, message):
    with pytest.raises(ValueError, match=message):
        config(model_type, **fields)


@pytest.mark.parametrize(
    ("model_type", "fields", "message"),
    [
        (
            "llama",
            {"num_attention_heads": 0},
            "num_attention_heads must be a whole number of at least 1.* as 0",
        ),
        ("llama", {"num_attention_heads": 4.0}, "num_attention_heads must be a whole number .* as 4.0"),
        ("llama", {"hidden_size": "32"}, "hidden_size must be a whole number .* came as '32'"),
        ("llama", {"num_hidden_layers": True}, "num_hidden_layers must be a whole number .* came as True"),
        ("llama", {"num_key_value_heads": 3}, "must be a multiple of num_key_value_heads.* got 4 and 3"),
        (
            "llama",
            {"hidden_size": 30, "head_dim": None},
            "hidden_size must be a multiple of num_attention_heads .* came as 30 and 4",
        ),
        ("llama", {"head_dim": 7}, "partial_rotary_factor 1 of head_dim 7 gives 7 rotary channels"),
        (
            "phi3",
            {"partial_rotary_factor": 1.5},
            "partial_rotary_factor 1.5 of head_dim 8 gives 12 rotary channels",
        ),
        (
            "llama",
            {"rms_norm_eps": 0},
            "rms_norm_eps must be a positive number that float32 holds, but came as 0",
        ),
        ("llama", {"tie_word_embeddings": 1}, "tie_word_embeddings must be true or false, but came as 1"),
        (
            "llama",
            {"rope_scaling": "linear"},
            "rope_scaling must be an object of fields, but came as 'linear'",
        ),
        (
            "llama",
            {"rope_scaling": {"type": "linear"}},
            "factor must be a positive number that float32 holds, but came as None",
        ),
        (
            "llama",
            {"rope_scaling": LLAMA3 | {"high_freq_factor": 1.0}},
            "high_freq_factor must be greater than low_freq_factor, but they came as 1.0 and 1.0",
        ),
        (
            "phi3",
            {"rope_scaling": LONGROPE | {"long_factor": 2}},
            "long_factor must be a list of numbers, but came as 2",
        ),
        (
            "llama",
            {"rope_scaling": {"type": "dynamic", "factor": -4}},
            "factor must be a positive number that float32 holds, but came as -4",
        ),
        ("llama", {"rope_theta": 10**400}, "rope_theta must be a positive number that float32 .* as 1000"),
        (
            "llama",
            {"rope_theta": float("inf")},
            "rope_theta must be a positive number that float32 .* as inf",
        ),
        (
            "llama",
            {"rope_theta": 1, "rope_scaling": LLAMA3 | {"rope_type": "yarn"}},
            "rope_theta must be greater than 1 for yarn, .* as 1",
        ),
        (
            "llama",
            {"rope_scaling": LLAMA3 | {"rope_type": "yarn", "original_max_position_embeddings": 10**400}},
            "original_max_position_embeddings must be a whole number .* that 64 bits hold, but came as 1000",
        ),
        (
            "phi3",
            {"rope_scaling": LONGROPE | {"long_factor": [2]}},
            "one number for each of the 4 rotary pairs, but have 4 and 1",
        ),
        ("gemma2", {"num_hidden_layers": 10**12}, "num_hidden_layers must be at most 10,000"),
        (
            "mixtral",
            {"num_local_experts": 0},
            "num_local_experts must be a whole number of at least 1.* as 0",
        ),
        ("mixtral", {"num_local_experts": 10**12}, "num_experts must be at most 10,000, but came as 1,000,0"),
        ("mixtral", {"num_experts_per_tok": 9}, "num_experts_per_tok must be from 1 to .*, 8, but came as 9"),
        ("qwen3_moe", {"num_experts": "128"}, "num_experts must be a whole number of at least 1.* as '128'"),
        (
            "qwen3_moe",
            {"num_experts_per_tok": 0},
            "num_experts_per_tok must be a whole number of at least 1.* as 0",
        ),
        ("qwen3_moe", {"norm_topk_prob": None}, "norm_topk_prob must be true or false, but came as None"),
        (
            "qwen3_moe",
            {"moe_intermediate_size": 1.5},
            "moe_intermediate_size must be a whole number of at least 1.* as 1.5",
        ),
        ("mistral", {"sliding_window": 0}, "sliding_window must be a whole number of at least 1.* as 0"),
        ("gemma2", {"final_logit_softcapping": -1}, "final_logit_softcapping must be a positive number"),
        (
            "gemma2",
            {"sliding_window_pattern": 0},
            "sliding_window_pattern must be a whole number of at least 1",
        ),
    ],
)
def test_malformed_fields_are_refused(model_type, fields, message):
    with pytest.raises(ValueError, match=message):
        config(model_type, **fields)


@pytest.mark.parametrize("missing", ["vocab_size", "num_attention_heads", "num_hidden_layers"])
def test_a_missing_size_is_named(missing):
    fields = {name: size for name, size in SIZES.items() if name != missing}
    with pytest.raises(ValueError, match=f"it lacks {missing}. Copy the file again"):
        decoder_config(fields | {"model_type": "llama"})


def test_a_file_is_read_from_its_directory_or_by_its_name(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(SIZES | {"model_type": "qwen3"}))
    (tmp_path / "other.json").write_text(json.dumps(SIZES | {"model_type": "mistral"}))
    assert read_config(tmp_path) == config("qwen3")
    assert read_config(str(tmp_path / "config.json")) == config("qwen3")
    assert read_config(tmp_path / "other.json") == config("mistral")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", r"config.json: it must be a JSON object, but holds \[\]"),
        ("{", "config.json is not valid JSON .* Copy the file again"),
        ("\xff", "config.json is not valid JSON .* Copy the file again"),
        ('{"model_type": "llama"}', "config.json: it lacks vocab_size, hidden_size"),
    ],
)
def test_a_malformed_file_is_refused(tmp_path, content, message):
    (tmp_path / "config.json").write_text(content, encoding="latin-1")
    with pytest.raises(ValueError, match=message):
        read_config(tmp_path)


def test_a_missing_file_is_named(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(FileNotFoundError, match=r"There is no .*config.json. Give the directory of a"):
            read_config(path)
