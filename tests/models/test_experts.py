"""A mixture of experts: its router, its memory, and how its weights are stored and counted."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support.caches import make_mesh

from qpaged.models import (
    DecoderConfig,
    Experts,
    forward,
    init_params,
    load_checkpoint,
    param_shapes,
    parameter_bytes,
    read_config,
    weights_bytes,
)
from qpaged.models.experts import route

SIZES = {
    "vocab_size": 11,
    "hidden_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
}
MODELS = {
    "mixtral": {"num_local_experts": 3, "intermediate_size": 20},
    "qwen3_moe": {
        "num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 20, "intermediate_size": 99,
    },
}  # fmt: skip
BLOCKS = {"mixtral": "block_sparse_moe", "qwen3_moe": "mlp"}
PROJECTIONS = {"mixtral": ("w1", "w3", "w2"), "qwen3_moe": ("gate_proj", "up_proj", "down_proj")}
PARTS = ("gate_proj", "up_proj", "down_proj")


def test_the_router_weighs_the_largest_and_drops_the_rest():
    logits = jnp.log(jnp.array([[1.0, 5.0, 2.0, 4.0], [6.0, 1.0, 3.0, 2.0]]))
    kept = np.array([[0, 5, 0, 4], [6, 0, 3, 0]])
    np.testing.assert_allclose(route(logits, Experts(4, 2, False)), kept / 12, rtol=1e-5)
    np.testing.assert_allclose(route(logits, Experts(4, 2, True)), kept / 9, rtol=1e-5)


def test_the_router_works_in_float32_and_chooses_as_many_where_all_are_equal():
    weights = route(jnp.zeros((2, 6), jnp.bfloat16), Experts(6, 3, False))
    assert weights.dtype == jnp.float32
    np.testing.assert_allclose(np.sort(weights), [[0, 0, 0, 1 / 6, 1 / 6, 1 / 6]] * 2, rtol=1e-6)


def decoder(**changes):
    """Return a decoder of one layer whose experts are larger than all else."""
    sizes = SIZES | {"num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 256}
    return DecoderConfig(**sizes | {"experts": Experts(4, 2, True)} | changes)


def run(params, config):
    tokens = jnp.arange(8, dtype=jnp.int32)
    return forward(params, config, tokens, tokens, lambda layer, query, key, value: query)


def test_an_expert_that_overflows_reaches_no_token_that_is_not_routed_to_it():
    config = decoder()
    params = init_params(config, jax.random.key(0))
    params["model.layers.0.mlp.gate.weight"] = jnp.zeros(
        (4, 64)
    )  # the first two are chosen where all are equal
    name = "model.layers.0.mlp.experts.up_proj.weight"
    overflowing = params | {name: params[name].at[2:].set(jnp.inf)}
    np.testing.assert_array_equal(run(overflowing, config), run(params, config))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16])  # XLA on CPU widens bfloat16 before a loop
def test_memory_does_not_grow_with_the_number_of_experts(dtype):
    def temporary_bytes(num_experts):
        config = decoder(experts=Experts(num_experts, 2, True))
        shapes = {name: jax.ShapeDtypeStruct(shape, dtype) for name, shape in param_shapes(config).items()}
        compiled = jax.jit(run, static_argnums=1).lower(shapes, config).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    one_expert = 3 * 64 * 256 * 2
    assert temporary_bytes(32) - temporary_bytes(4) < one_expert


@pytest.fixture(params=MODELS)
def checkpoint(request, tmp_path):
    """Return the directory of a random checkpoint, with names that are spelled out here."""
    model_type = request.param
    (tmp_path / "config.json").write_text(json.dumps(SIZES | MODELS[model_type] | {"model_type": model_type}))
    shapes = {}
    for name, shape in param_shapes(read_config(tmp_path)).items():
        stored = re.sub(r"\.mlp\.", f".{BLOCKS[model_type]}.", name)
        if ".experts." not in name:
            shapes[stored] = shape
            continue
        for ours, theirs in zip(PARTS, PROJECTIONS[model_type], strict=True):
            stored = stored.replace(ours, theirs)
        shapes |= {stored.replace("experts", f"experts.{expert}"): shape[1:] for expert in range(3)}
    rng = np.random.default_rng(0)
    weights = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    save_file(weights, tmp_path / "model.safetensors")
    return tmp_path


def expert_name(directory, part, expert):
    model_type = json.loads((directory / "config.json").read_text())["model_type"]
    projection = PROJECTIONS[model_type][PARTS.index(part)]
    return f"model.layers.1.{BLOCKS[model_type]}.experts.{expert}.{projection}.weight"


def edit_weights(directory, edit):
    weights = load_file(directory / "model.safetensors")
    edit(weights)
    save_file(weights, directory / "model.safetensors")


@pytest.mark.parametrize("asked", [None, jnp.bfloat16])
@pytest.mark.parametrize("devices", [1, 2])
def test_experts_are_loaded_stacked_in_order(checkpoint, asked, devices):
    mesh = make_mesh((devices,), ("tp",)) if devices > 1 else None
    config, params = load_checkpoint(checkpoint, asked, mesh, streamed=devices > 1)
    assert {name: weight.shape for name, weight in params.items()} == param_shapes(config)
    stored = load_file(checkpoint / "model.safetensors")
    for part in PARTS:
        weights = params[f"model.layers.1.mlp.experts.{part}.weight"]
        assert weights.dtype == jnp.dtype(asked or jnp.float32)
        for expert in range(3):
            expected = stored[expert_name(checkpoint, part, expert)]
            np.testing.assert_array_equal(weights[expert], expected.astype(weights.dtype))


def test_bytes_of_experts_are_counted_from_files_and_from_the_configuration_alone(checkpoint):
    _, params = load_checkpoint(checkpoint, jnp.bfloat16)
    loaded = sum(weight.nbytes for weight in params.values())
    assert parameter_bytes(checkpoint) == 2 * loaded  # stored as float32
    (checkpoint / "model.safetensors").unlink()
    assert weights_bytes(checkpoint) == (loaded, "computed from config.json, as bfloat16")


MIXTRAL_8X7B = {
    "model_type": "mixtral", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
}  # fmt: skip
QWEN3_30B_A3B = {
    "model_type": "qwen3_moe", "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144,
    "moe_intermediate_size": 768, "num_hidden_layers": 48, "num_attention_heads": 32,
    "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128,
}  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "parameters"), [(MIXTRAL_8X7B, 46_702_792_704), (QWEN3_30B_A3B, 30_532_122_624)]
)
def test_models_that_people_run_have_their_published_numbers_of_parameters(tmp_path, fields, parameters):
    (tmp_path / "config.json").write_text(json.dumps(fields))
    assert weights_bytes(tmp_path)[0] == 2 * parameters


@pytest.mark.parametrize(
    ("fields", "name"), [(MIXTRAL_8X7B, "num_experts"), (QWEN3_30B_A3B, "num_local_experts")]
)
def test_experts_may_be_counted_under_either_name(tmp_path, fields, name):
    counted = {key: value for key, value in fields.items() if key != "num_experts"} | {name: 9}
    (tmp_path / "config.json").write_text(json.dumps(counted))
    assert read_config(tmp_path).experts.num_experts == 9


def test_a_missing_expert_is_named_as_it_is_stored(checkpoint):
    name = expert_name(checkpoint, "down_proj", 1)
    edit_weights(checkpoint, lambda weights: weights.pop(name))
    with pytest.raises(ValueError, match=f"has no tensor '{name}', which .* Copy all files"):
        load_checkpoint(checkpoint)


def test_an_expert_of_another_shape_is_named(checkpoint):
    name = expert_name(checkpoint, "up_proj", 2)
    edit_weights(checkpoint, lambda weights: weights.update({name: np.ones((7, 12), np.float32)}))
    with pytest.raises(
        ValueError, match=rf"'{name}' of shape \(7, 12\), but the conf.* calls for \(20, 12\)"
    ):
        load_checkpoint(checkpoint)


@pytest.mark.parametrize("part", ["experts.3.{}", "shared_expert.{}", "shared_expert_gate"])
def test_experts_that_the_configuration_does_not_have_are_refused(checkpoint, part):
    name = expert_name(checkpoint, "gate_proj", 0)
    projection = name.split(".")[-2]
    name = name.replace(f"experts.0.{projection}", part.format(projection))
    edit_weights(checkpoint, lambda weights: weights.update({name: np.ones((20, 12), np.float32)}))
    with pytest.raises(
        ValueError,
        match=f"has the tensor '{name}', which config.json .* does not call for. Use the config.json",
    ):
        load_checkpoint(checkpoint)
