"""Every family agrees with transformers' own model in torch, on random checkpoints with all features on."""

import math
from dataclasses import asdict, dataclass, field, replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.packages import require_packages

require_packages("torch", "transformers")

import torch
import transformers
from support.dense_attention import dense_attention

from qpaged import PagedAttentionCache, PagedAttentionCacheMetaData, PagedAttentionMetadata, paged_attention
from qpaged.models import Experts, LinearScaling, Rope, YarnScaling, forward, load_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore")
LENGTH, PAGE = 40, 8
SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "attn_implementation": "eager",
}
GEMMA = {
    "head_dim": 16,
    "query_pre_attn_scalar": 40,
    "sliding_window": 7,
    "final_logit_softcapping": 8.0,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
PAIRS = [1.0, 2.0, 3.0, 4.0]  # factors of the 4 pairs of a head of 8 channels
TOKENS = np.random.default_rng(0).integers(1, SIZES["vocab_size"], LENGTH).astype(np.int32)


@dataclass(frozen=True)
class Case:
    """A model of transformers, and for each feature the fields of our configuration that turn it off."""

    name: str
    fields: dict
    without: dict = field(default_factory=dict)
    shard: str = "1GB"

    def config(self):
        return getattr(transformers, f"{self.name}Config")(**self.fields)

    def model(self):
        architecture = "ForConditionalGeneration" if self.name == "Gemma3" else "ForCausalLM"
        name = self.name.replace("Gemma3Text", "Gemma3") + architecture
        return getattr(transformers, name)(self.config())


CASES = {
    "llama": Case(
        "Llama",
        SIZES
        | {"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 32}, "rope_theta": 500.0}
        | {"attention_bias": True, "mlp_bias": True},
        {
            "rope scaling": {"rope": Rope(500.0)},
            "rope base": {"rope": Rope()},
            "query, key and value biases": {"attention_bias": False},
            "output bias": {"output_bias": False},
            "MLP biases": {"mlp_bias": False},
        },
        shard="20KB",
    ),
    "yarn": Case(
        "Llama",
        SIZES | {"head_dim": 32, "max_position_embeddings": 128, "rope_scaling": YARN},
        {
            "rope scaling": {"rope": Rope()},
            "amplitude": {"rope": Rope(scaling=YarnScaling(4.0, 32, 1.0))},
            "original context": {"rope": Rope(scaling=YarnScaling(4.0, 128, 1 + 0.1 * math.log(4)))},
        },
    ),
    "yarn with factors of its own": Case(
        "Llama",
        SIZES
        | {"head_dim": 32, "max_position_embeddings": 64}
        | {"rope_scaling": YARN | {"beta_fast": 8.0, "beta_slow": 2.0, "attention_factor": 1.5}},
        {"turns": {"rope": Rope(scaling=YarnScaling(4.0, 32, 1.5))}},
    ),
    "dynamic": Case(
        "Llama",
        SIZES | {"max_position_embeddings": 64, "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
    ),
    "mistral": Case(
        "Mistral",
        SIZES | {"sliding_window": 7, "head_dim": 16},
        {"window": {"layer_types": ()}, "window's length": {"sliding_window": 8}},
    ),
    "qwen2": Case(
        "Qwen2",
        SIZES | {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 2},
        {
            "biases": {"attention_bias": False},
            "window": {"layer_types": ()},
            "window in upper layers alone": {"layer_types": ("sliding_attention",) * 4},
        },
    ),
    "qwen3": Case(
        "Qwen3",
        SIZES
        | {"head_dim": 16, "attention_bias": True, "rope_scaling": {"rope_type": "linear", "factor": 4.0}},
        {
            "norm of query and key": {"query_key_norm": False},
            "biases": {"attention_bias": False},
            "rope scaling": {"rope": Rope()},
        },
    ),
    "gemma2": Case(
        "Gemma2",
        SIZES | GEMMA | {"attn_logit_softcapping": 3.0},
        {
            "cap of attention's scores": {"attn_logit_softcapping": None},
            "scale of attention's scores": {"query_pre_attn_scalar": None},
            "cap of logits": {"final_logit_softcapping": None},
            "windows": {"layer_types": ()},
            "alternation": {"layer_types": ("full_attention", "sliding_attention") * 2},
            "norms after": {"sandwich_norms": False},
            "1 + w": {"unit_offset": False},
            "scaled embeddings": {"scale_embeddings": False},
            "gelu": {"hidden_act": "silu"},
        },
    ),
    "gemma3_text": Case(
        "Gemma3Text",
        SIZES
        | GEMMA
        | {"sliding_window_pattern": 3, "rope_local_base_freq": 100.0, "rope_theta": 1e4}
        | {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
        {
            "norm of query and key": {"query_key_norm": False},
            "local rope": {"sliding_rope": None},
            "scaled global rope": {"rope": Rope()},
            "scaling of the global rope alone": {"sliding_rope": Rope(100.0, scaling=LinearScaling(4.0))},
            "windows": {"layer_types": ()},
            "1 + w": {"unit_offset": False},
            "norms after": {"sandwich_norms": False},
            "scaled embeddings": {"scale_embeddings": False},
        },
    ),
    "gemma3": Case(
        "Gemma3",
        {
            "text_config": SIZES
            | GEMMA
            | {"layer_types": ["full_attention", "sliding_attention"] * 2, "final_logit_softcapping": None},
            "vision_config": {
                "hidden_size": 8,
                "intermediate_size": 8,
                "num_hidden_layers": 1,
                "num_attention_heads": 1,
                "image_size": 8,
                "patch_size": 4,
            },
            "mm_tokens_per_image": 1,
            "attn_implementation": "eager",
        },
        {"windows": {"layer_types": ()}},
    ),
    "mixtral": Case(
        "Mixtral",
        SIZES | {"head_dim": 16, "sliding_window": 7, "num_local_experts": 5, "num_experts_per_tok": 2},
        {
            "weights of experts that sum to 1": {"experts": Experts(5, 2, False)},
            "second expert": {"experts": Experts(5, 1, True)},
            "window": {"layer_types": ()},
        },
        shard="20KB",
    ),
    "qwen3_moe": Case(
        "Qwen3Moe",
        SIZES
        | {"head_dim": 16, "attention_bias": True, "norm_topk_prob": True}
        | {"moe_intermediate_size": 24, "num_experts": 9, "num_experts_per_tok": 3},
        {
            "norm of query and key": {"query_key_norm": False},
            "biases": {"attention_bias": False},
            "weights of experts that sum to 1": {"experts": Experts(9, 3, False)},
            "third expert": {"experts": Experts(9, 2, True)},
        },
    ),
    "qwen3_moe, weights of experts as they are": Case(
        "Qwen3Moe",
        SIZES | {"moe_intermediate_size": 24, "num_experts": 9, "num_experts_per_tok": 3},
        {"weights of experts that sum to less than 1": {"experts": Experts(9, 3, True)}},
    ),
    "phi3": Case(
        "Phi3",
        SIZES | {"partial_rotary_factor": 0.5, "sliding_window": 7, "hidden_size": 64},
        {"partial turning": {"rope": Rope()}, "window": {"layer_types": ()}},
    ),
}
for extent, original in {"short": LENGTH, "long": LENGTH - 1}.items():
    factors = {"type": "longrope", "short_factor": PAIRS, "long_factor": PAIRS[::-1]}
    sizes = {"max_position_embeddings": 400, "original_max_position_embeddings": original}
    CASES[f"phi3 longrope, {extent}"] = Case(
        "Phi3",
        SIZES | sizes | {"rope_scaling": factors},
        {"rope scaling": {"rope": Rope()}},
    )


def randomize(model):
    """Draw weights so large that each feature matters, and none of them neutral."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            neutral = 1.0 if "norm" in name and not weight.eq(0).all() else 0.0
            scale = 2 * weight.shape[-1] ** -0.5 if weight.ndim > 1 else 0.3
            weight.copy_(neutral + scale * torch.randn(weight.shape))


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """Return loaded(name): configuration and weights of a case from its checkpoint, and logits from torch."""

    @cache
    def load(name):
        case = CASES[name]
        directory = tmp_path_factory.mktemp("checkpoint")
        model = case.model().eval()
        randomize(model)
        model.save_pretrained(directory, max_shard_size=case.shard)
        with torch.no_grad():
            expected = model(torch.tensor(TOKENS[None], dtype=torch.long)).logits[0].numpy()
        config, params = load_checkpoint(directory)
        return config.for_context(LENGTH), params, expected

    return load


def logits(config, params):
    def attend(layer, *heads):
        return dense_attention(config.attention(layer), *heads)

    return forward(params, config, jnp.asarray(TOKENS), jnp.arange(LENGTH), attend)


def relative_error(actual, expected):
    return np.abs(np.asarray(actual) - expected).max() / np.abs(expected).max()


@pytest.mark.parametrize("name", CASES)
def test_logits_agree(loaded, name):
    config, params, expected = loaded(name)
    assert relative_error(logits(config, params), expected) < 1e-4


@pytest.mark.parametrize(("name", "feature"), [(name, f) for name in CASES for f in CASES[name].without])
def test_logits_differ_without_a_feature(loaded, name, feature):
    config, params, expected = loaded(name)
    without = replace(config, **CASES[name].without[feature])
    with jax.disable_jit():  # each configuration would be compiled
        assert relative_error(logits(without, params), expected) > 1e-2


@partial(jax.jit, static_argnames="options", donate_argnums=0)
def write_and_attend(view, query, key, value, metadata, options):
    if metadata.is_decode_mode():
        view = view.write_decodes_to_cache(key, value, metadata)
    else:
        view = view.write_prefill_to_cache(key, value, metadata)
    return view, paged_attention(query, view, metadata, **asdict(options))


def make_views(config):
    sizes = PagedAttentionCacheMetaData(
        batch_size=1,
        num_hidden_layers=1,
        num_pages_per_layer=LENGTH // PAGE,
        num_pages_per_sequence=LENGTH // PAGE,
        max_sequences=LENGTH,
        page_size=PAGE,
        num_kv_heads=config.num_key_value_heads,
        kv_head_dim_size=config.head_dim,
        hbm_utilization=0.9,
    )
    return [
        PagedAttentionCache.init_cache(None, jnp.float32, sizes).views[0]
        for _ in range(config.num_hidden_layers)
    ]


def prefill(start, stop):
    return PagedAttentionMetadata.prefill(
        position=np.arange(start, stop, dtype=np.int32), page_table=np.arange(LENGTH // PAGE, dtype=np.int32)
    )


def decode(position):
    return PagedAttentionMetadata.decode(
        position=np.array([position], np.int32), page_table=np.arange(LENGTH // PAGE, dtype=np.int32)[None]
    )


def step_logits(views, config, params, metadata):
    """Return the positions of a step and its logits, after it has written to the views."""
    positions = metadata.decodes_position if metadata.is_decode_mode() else metadata.prefill_position

    def attend(layer, query, key, value):
        views[layer], out = write_and_attend(
            views[layer], query, key, value, metadata, config.attention(layer)
        )
        return out

    return positions, forward(params, config, jnp.asarray(TOKENS[positions]), jnp.asarray(positions), attend)


@pytest.mark.parametrize("name", CASES)
def test_logits_agree_through_a_paged_cache_in_chunks(loaded, name):
    config, params, expected = loaded(name)
    views = make_views(config)
    for start in range(0, LENGTH, LENGTH // 2):
        positions, logits = step_logits(views, config, params, prefill(start, start + LENGTH // 2))
        assert relative_error(logits, expected[positions]) < 1e-4


@pytest.mark.parametrize("name", ["llama", "mixtral", "qwen3_moe"])
def test_logits_agree_through_a_paged_cache_token_by_token(loaded, name):
    config, params, expected = loaded(name)
    views = make_views(config)
    step_logits(views, config, params, prefill(0, LENGTH - 5))
    for position in range(LENGTH - 5, LENGTH):
        positions, logits = step_logits(views, config, params, decode(position))
        assert relative_error(logits, expected[positions]) < 1e-4
