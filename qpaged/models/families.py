"""The model families of Hugging Face's `config.json`, and the defaults that each leaves unsaid there."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

from qpaged._arguments import check_count
from qpaged.models._json_fields import Json, read_flag, read_integer, read_number, read_object
from qpaged.models._rope_fields import read_ropes
from qpaged.models.config import FULL, SIZES, SLIDING, Activation, DecoderConfig, LayerType
from qpaged.models.experts import Experts
from qpaged.models.rope import LongRopeScaling, YarnScaling

# Rules for which layers have a sliding window, for files without layer_types.


def _no_layer(fields: Json, layer: int) -> bool:
    return False


def _every_layer(fields: Json, layer: int) -> bool:
    return fields["sliding_window"] is not None


def _upper_layers(fields: Json, layer: int) -> bool:
    return _sliding_window(fields) is not None and layer >= read_integer(fields, "max_window_layers", 0)


def _all_but_every_nth(fields: Json, layer: int) -> bool:
    return (layer + 1) % read_integer(fields, "sliding_window_pattern", 1) != 0


@dataclass(frozen=True)
class Family:
    """The meaning of one model type's files beyond what they say.

    Attributes:
        defaults: values of fields that a file leaves out.
        features: fields of `DecoderConfig` that all models of the family share.
        slides: (fields, layer) -> True if the layer has a sliding window, for files without `layer_types`.
        required: fields that must have this value, if they are there: another value is not implemented, or is
            understood in different ways by different libraries.
        num_experts: the field that has the number of a layer's experts; None if layers have one MLP.
        inner_size: the field that has the inner channels of an MLP.
        stored_names: parts of our names of weights, and what a file has instead.
    """

    defaults: Json = field(default_factory=dict)
    features: Mapping[str, Any] = field(default_factory=dict)
    slides: Callable[[Json, int], bool] = _no_layer
    required: Json = field(default_factory=dict)
    num_experts: str | None = None
    inner_size: str = "intermediate_size"
    stored_names: Mapping[str, str] = field(default_factory=dict)


# The defaults are those of transformers' configuration classes, as files leave out what is at its default.

DEFAULTS = {
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e4,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "use_sliding_window": True,
}
NO_LAYER_TYPES = {"layer_types": None}
QWEN = {
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
GEMMA = {
    "head_dim": 256,
    "tie_word_embeddings": True,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
}
GEMMA2 = GEMMA | {
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 8192,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "sliding_window_pattern": 2,
}
GEMMA3 = GEMMA | {
    "vocab_size": 262208,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 131072,
    "rope_theta": 1e6,
    "rope_local_base_freq": 1e4,
    "sliding_window_pattern": 6,
}
GEMMA_FEATURES = {"sandwich_norms": True, "unit_offset": True, "scale_embeddings": True}
MISTRAL = {"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096}
MIXTRAL = {
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "max_position_embeddings": 131072,
    "sliding_window": None,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
}
MIXTRAL_NAMES = {
    ".mlp.": ".block_sparse_moe.",
    ".gate_proj.": ".w1.",
    ".down_proj.": ".w2.",
    ".up_proj.": ".w3.",
}
QWEN3_MOE = {
    "num_key_value_heads": 4,
    "max_position_embeddings": 32768,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": False,
}
EXPERT_COUNTS = "num_experts", "num_local_experts"  # transformers 5 writes the second of Qwen3-MoE, too
EXPERTS_IN_EVERY_LAYER = {"decoder_sparse_step": 1, "mlp_only_layers": []}
PHI3 = {
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 4096,
    "original_max_position_embeddings": 4096,
    "sliding_window": None,
}

FAMILIES = {
    "gemma2": Family(GEMMA2, GEMMA_FEATURES, _all_but_every_nth),
    "gemma3_text": Family(
        GEMMA3,
        GEMMA_FEATURES | {"query_key_norm": True},
        _all_but_every_nth,
        required={"attn_logit_softcapping": None, "use_bidirectional_attention": False},
    ),
    "llama": Family(required=NO_LAYER_TYPES | {"sliding_window": None}),
    "mistral": Family(MISTRAL, slides=_every_layer, required=NO_LAYER_TYPES),
    "mixtral": Family(
        MIXTRAL,
        slides=_every_layer,
        required=NO_LAYER_TYPES | {"norm_topk_prob": True},
        num_experts="num_local_experts",
        stored_names=MIXTRAL_NAMES,
    ),
    "phi3": Family(PHI3, {"fused_projections": True}, _every_layer, required=NO_LAYER_TYPES),
    "qwen2": Family(QWEN, {"attention_bias": True, "output_bias": False}, _upper_layers),
    "qwen3": Family(QWEN | {"head_dim": 128}, {"query_key_norm": True}, _upper_layers),
    "qwen3_moe": Family(
        QWEN3_MOE,
        {"query_key_norm": True},
        required=NO_LAYER_TYPES | EXPERTS_IN_EVERY_LAYER | {"use_sliding_window": False},
        num_experts="num_experts",
        inner_size="moe_intermediate_size",
    ),
}
PARENTS = {"gemma3": "gemma3_text"}
"""Model types of text and images, by the type of their `text_config`."""

DERIVED_SIZES = ("num_key_value_heads", "head_dim")
"""Sizes that follow from others if a file leaves them out or has null for them."""

OPTIONAL_NUMBERS = ("query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping")


def decoder_config(fields: Json) -> DecoderConfig:
    """Return the decoder that the fields of a `config.json` describe.

    Raises:
        ValueError: a family or feature that is not implemented, or fields that are missing or malformed.
    """
    fields = _text_fields(fields)
    family = FAMILIES[fields["model_type"]]
    _check_required(fields, family.required)
    fields = {**DEFAULTS, **family.defaults, **_with_count_of_experts(fields, family)}
    sizes = _read_sizes(fields)
    sizes["intermediate_size"] = read_integer(fields, family.inner_size, 1)
    rope, sliding_rope = read_ropes(fields)
    if isinstance(rope.scaling, LongRopeScaling):
        # The short factors hold up to here; `DecoderConfig.for_context` switches to the long ones.
        sizes["max_position_embeddings"] = rope.scaling.original_max_position_embeddings
    elif isinstance(rope.scaling, YarnScaling):
        sizes["max_position_embeddings"] = rope.scaling.longest(sizes["max_position_embeddings"])
    described: dict[str, Any] = {
        **sizes,
        "model_type": fields["model_type"],
        "rms_norm_eps": read_number(fields, "rms_norm_eps"),
        "tie_word_embeddings": read_flag(fields, "tie_word_embeddings"),
        "attention_bias": read_flag(fields, "attention_bias"),
        "output_bias": read_flag(fields, "attention_bias"),
        "mlp_bias": read_flag(fields, "mlp_bias"),
        "hidden_act": _read_activation(fields),
        "experts": _read_experts(fields, family),
        "rope": rope,
        "sliding_rope": sliding_rope,
        "layer_types": _read_layer_types(fields, family, sizes["num_hidden_layers"]),
    }
    for name in OPTIONAL_NUMBERS:
        if fields.get(name) is not None:
            described[name] = read_number(fields, name)
    if SLIDING in described["layer_types"]:
        described["sliding_window"] = _sliding_window(fields)
    described.update(family.features)
    return DecoderConfig(**described)


def llama_fields(config: DecoderConfig) -> dict[str, Any]:
    """Return the fields of a plain Llama's `config.json`.

    Raises:
        ValueError: the decoder has features that a plain Llama has not.
    """
    fields: dict[str, Any] = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    for name in (*SIZES, "rms_norm_eps", "tie_word_embeddings"):
        fields[name] = getattr(config, name)
    fields["rope_theta"] = config.rope.theta
    fields |= {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "rope_scaling": None}
    # Anything that these fields do not say would be lost: read them back to see.
    if decoder_config(fields) != config:
        raise ValueError(
            "config must be a plain Llama's to be saved, without what other families add, "
            f"but came as {config}."
        )
    return fields


def _text_fields(fields: Json) -> Json:
    """Return the fields of the text decoder, checked to be of a model that can be loaded."""
    if not isinstance(fields, Mapping):
        raise ValueError(f"it must be a JSON object, but holds {fields!r:.60}. Copy the file again.")
    # Model types are compared in tuples, as a malformed one may be a list, which is not hashable.
    if fields.get("model_type") in tuple(PARENTS):
        fields = _fields_of_text_config(fields)
    if fields.get("model_type") not in tuple(FAMILIES):
        if fields.get("model_type") is None:
            raise ValueError("it lacks model_type. Copy the file again.")
        known = ", ".join(sorted([*FAMILIES, *PARENTS]))
        raise ValueError(
            f"it says model_type {fields['model_type']!r}, but only {known} can be loaded. "
            "Choose a checkpoint of one of these."
        )
    if fields.get("quantization_config"):
        method = read_object(fields, "quantization_config").get("quant_method")
        raise ValueError(
            f"its weights are quantized ({method}, as quantization_config says), which cannot be loaded. "
            "Choose the checkpoint that it was made from."
        )
    return fields


def _fields_of_text_config(fields: Json) -> Json:
    """Return the `text_config` of a model of text and images, with the fields that hold for all of it."""
    shared = {name: fields[name] for name in ("tie_word_embeddings", "quantization_config") if name in fields}
    text_type = PARENTS[fields["model_type"]]
    return {**shared, **read_object(fields, "text_config"), "model_type": text_type}


def _check_required(fields: Json, required: Json) -> None:
    """Raise ValueError if a field has another value than the one that is implemented."""
    for name, value in required.items():
        if fields.get(name) not in (None, value):
            rule = "absent" if value is None else f"absent or {json.dumps(value)}"
            raise ValueError(
                f"{name} must be {rule} for a model of type {fields['model_type']}, but came as "
                f"{fields[name]!r:.60}. Choose a checkpoint without it."
            )


def read_head_sizes(fields: Json) -> dict[str, int]:
    """Return the sizes of layers and heads, which any decoder has; see :func:`_read_sizes`."""
    return _read_sizes(fields, [name for name in SIZES if name not in ("vocab_size", "intermediate_size")])


def _read_sizes(fields: Json, names: Sequence[str] = SIZES) -> dict[str, int]:
    """Return the sizes of these names, the derived ones computed if they are not given."""
    missing = [name for name in names if name not in DERIVED_SIZES and name not in fields]
    if missing:
        raise ValueError(f"it lacks {', '.join(missing)}. Copy the file again.")
    sizes: dict[str, int] = {}
    for name in names:
        if name not in DERIVED_SIZES or fields.get(name) is not None:
            sizes[name] = read_integer(fields, name, 1)
    check_count("num_hidden_layers", sizes["num_hidden_layers"])
    num_heads = sizes["num_attention_heads"]
    hidden_size = sizes["hidden_size"]
    if "head_dim" not in sizes:
        if hidden_size % num_heads:
            raise ValueError(
                "hidden_size must be a multiple of num_attention_heads where head_dim is not given, "
                f"but they came as {hidden_size} and {num_heads}."
            )
        sizes["head_dim"] = hidden_size // num_heads
    sizes.setdefault("num_key_value_heads", num_heads)
    return sizes


def _read_activation(fields: Json) -> Activation:
    """Return the activation of the MLP; Gemma's files have a field of their own for it."""
    name = "hidden_activation" if "hidden_activation" in fields else "hidden_act"
    supported = get_args(Activation)
    if fields[name] not in supported:
        raise ValueError(
            f"it says {name} = {fields[name]!r}, but only {' and '.join(supported)} are supported. "
            "Choose another checkpoint."
        )
    return fields[name]


def _with_count_of_experts(fields: Json, family: Family) -> Json:
    """Return the fields with the number of experts under the family's name, which not all writers use."""
    name = family.num_experts
    others = [other for other in EXPERT_COUNTS if other in fields]
    if name is None or name in fields or not others:
        return fields
    return {**fields, name: fields[others[0]]}


def _read_experts(fields: Json, family: Family) -> Experts | None:
    if family.num_experts is None:
        return None
    return Experts(
        num_experts=read_integer(fields, family.num_experts, 1),
        num_experts_per_tok=read_integer(fields, "num_experts_per_tok", 1),
        norm_topk_prob=read_flag(fields, "norm_topk_prob"),
    )


def _read_layer_types(fields: Json, family: Family, num_layers: int) -> tuple[LayerType, ...]:
    """Return the type of each layer; () if no layer has a sliding window by the family's rule."""
    layer_types = fields.get("layer_types")
    if layer_types is None:
        return _default_layer_types(fields, family, num_layers)
    is_list = isinstance(layer_types, list)
    if not is_list or any(layer_type not in get_args(LayerType) for layer_type in layer_types):
        raise ValueError(
            f"layer_types must be a list of {' and '.join(get_args(LayerType))}, but came as {layer_types!r}."
        )
    return tuple(layer_types)


def _default_layer_types(fields: Json, family: Family, num_layers: int) -> tuple[LayerType, ...]:
    layer_types: list[LayerType] = []
    for layer in range(num_layers):
        layer_types.append(SLIDING if family.slides(fields, layer) else FULL)
    return tuple(layer_types) if SLIDING in layer_types else ()


def _sliding_window(fields: Json) -> int | None:
    """Return the window, unless the file has one that it does not use, as Qwen's do."""
    return fields["sliding_window"] if read_flag(fields, "use_sliding_window") else None
