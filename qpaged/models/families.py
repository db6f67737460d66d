"""The model families of Hugging Face's `config.json`, and what each leaves unsaid there."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

from qpaged.models.config import SIZES, Activation, DecoderConfig, LayerType
from qpaged.models.rope import LinearScaling, Llama3Scaling, LongRopeScaling, Rope, Scaling

Json = Mapping[str, Any]
FULL, SLIDING = get_args(LayerType)


def _no_layer(found: Json, layer: int) -> bool:
    return False


def _every_layer(found: Json, layer: int) -> bool:
    return found["sliding_window"] is not None


def _upper_layers(found: Json, layer: int) -> bool:
    return _window(found) is not None and layer >= _whole(found, "max_window_layers", 0)


def _all_but_every_nth(found: Json, layer: int) -> bool:
    return (layer + 1) % _whole(found, "sliding_window_pattern", 1) != 0


@dataclass(frozen=True)
class Family:
    """What the files of one model type mean where they are silent.

    Attributes:
        defaults: values of fields that a file leaves out.
        features: fields of `DecoderConfig` that all models of the family share.
        slides: (fields, layer) -> whether the layer has a sliding window, where no `layer_types` say so.
        plain: fields that must have this value, if they are there: another is not implemented, or is
            understood in different ways by different libraries.
    """

    defaults: Json = field(default_factory=dict)
    features: Mapping[str, Any] = field(default_factory=dict)
    slides: Callable[[Json, int], bool] = _no_layer
    plain: Json = field(default_factory=dict)


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
DERIVED = ("num_key_value_heads", "head_dim")  # from other sizes, where they are not given
UNIFORM = {"layer_types": None}
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
        plain={"attn_logit_softcapping": None, "use_bidirectional_attention": False},
    ),
    "llama": Family(plain=UNIFORM | {"sliding_window": None}),
    "mistral": Family(MISTRAL, slides=_every_layer, plain=UNIFORM),
    "phi3": Family(PHI3, {"fused_projections": True}, _every_layer, UNIFORM),
    "qwen2": Family(QWEN, {"attention_bias": True, "output_bias": False}, _upper_layers),
    "qwen3": Family(QWEN | {"head_dim": 128}, {"query_key_norm": True}, _upper_layers),
}
PARENTS = {"gemma3": "gemma3_text"}
"""Model types of more than text, by the type of their `text_config`."""


def decoder_config(found: Json) -> DecoderConfig:
    """The decoder that the fields of a `config.json` describe.

    Raises:
        ValueError: a family or feature that is not implemented, or fields that are missing or malformed.
    """
    found = _text_part(found)
    family = FAMILIES[found["model_type"]]
    _check_plain(found, family.plain)
    found = {**DEFAULTS, **family.defaults, **found}
    sizes = _sizes(found)
    rope, sliding_rope = _ropes(found)
    if isinstance(rope.scaling, LongRopeScaling):  # until `DecoderConfig.for_context` is asked for more
        sizes["max_position_embeddings"] = rope.scaling.original_max_position_embeddings
    fields: dict[str, Any] = sizes | {
        "model_type": found["model_type"],
        "rms_norm_eps": _number(found, "rms_norm_eps"),
        "tie_word_embeddings": _flag(found, "tie_word_embeddings"),
        "attention_bias": _flag(found, "attention_bias"),
        "output_bias": _flag(found, "attention_bias"),
        "mlp_bias": _flag(found, "mlp_bias"),
        "hidden_act": _activation(found),
        "rope": rope,
        "sliding_rope": sliding_rope,
        "layer_types": _layer_types(found, family, sizes["num_hidden_layers"]),
    }
    for name in ("query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping"):
        fields[name] = None if found.get(name) is None else _number(found, name)
    if SLIDING in fields["layer_types"]:
        fields["sliding_window"] = _window(found)
    return DecoderConfig(**{**fields, **family.features})


def llama_fields(config: DecoderConfig) -> dict[str, Any]:
    """The fields of a plain Llama's `config.json`.

    Raises:
        ValueError: the decoder has features that a plain Llama has not.
    """
    names = (*SIZES, "rms_norm_eps", "tie_word_embeddings")
    fields: dict[str, Any] = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    fields |= {name: getattr(config, name) for name in names} | {"rope_theta": config.rope.theta}
    fields |= {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "rope_scaling": None}
    if decoder_config(fields) != config:
        raise ValueError(
            "config must be a plain Llama's to be saved, without what other families add, "
            f"but came as {config}."
        )
    return fields


def _text_part(found: Json) -> Json:
    if not isinstance(found, Mapping):
        raise ValueError(f"it must hold an object of fields, but holds {found!r}. Copy the file again.")
    if found.get("model_type") in (*PARENTS,):
        text = {**_object(found, "text_config"), "model_type": PARENTS[found["model_type"]]}
        shared = ("tie_word_embeddings", "quantization_config")
        found = {name: found[name] for name in shared if name in found} | text
    if found.get("model_type") not in (*FAMILIES,):
        known = ", ".join(sorted([*FAMILIES, *PARENTS]))
        raise ValueError(
            f"it says model_type {found.get('model_type')!r}, but only {known} can be loaded. "
            "Choose a checkpoint of one of these."
        )
    if found.get("quantization_config"):
        method = _object(found, "quantization_config").get("quant_method")
        raise ValueError(
            f"its weights are quantized ({method}, as quantization_config says), which cannot be loaded. "
            "Choose the checkpoint that it was made from."
        )
    return found


def _check_plain(found: Json, plain: Json) -> None:
    for name, value in plain.items():
        if found.get(name) not in (None, value):
            raise ValueError(
                f"it says {name} = {found[name]!r}, but only {value!r} is supported for a model of type "
                f"{found['model_type']}. Choose a checkpoint without it."
            )


def _sizes(found: Json) -> dict[str, int]:
    missing = [name for name in SIZES if name not in (*DERIVED, *found)]
    if missing:
        raise ValueError(f"it lacks {', '.join(missing)}. Copy the file again.")
    sizes = {
        name: _whole(found, name, 1) for name in SIZES if found.get(name) is not None or name not in DERIVED
    }
    heads, hidden = sizes["num_attention_heads"], sizes["hidden_size"]
    if "head_dim" not in sizes and hidden % heads:
        raise ValueError(
            "hidden_size must be a multiple of num_attention_heads where head_dim is not given, "
            f"but they came as {hidden} and {heads}."
        )
    return {"num_key_value_heads": heads, "head_dim": hidden // heads} | sizes


def _activation(found: Json) -> Activation:
    name = "hidden_activation" if "hidden_activation" in found else "hidden_act"
    if found[name] not in get_args(Activation):
        raise ValueError(
            f"it says {name} = {found[name]!r}, but only {' and '.join(get_args(Activation))} are supported. "
            "Choose another checkpoint."
        )
    return found[name]


def _layer_types(found: Json, family: Family, layers: int) -> tuple[LayerType, ...]:
    types = found.get("layer_types")
    if types is None:
        slides = [family.slides(found, layer) for layer in range(layers)]
        return tuple(SLIDING if each else FULL for each in slides) if any(slides) else ()
    if not isinstance(types, list) or any(kind not in get_args(LayerType) for kind in types):
        raise ValueError(
            f"layer_types must be a list of {' and '.join(get_args(LayerType))}, but came as {types!r}."
        )
    return tuple(types)


def _window(found: Json) -> int | None:
    return found["sliding_window"] if _flag(found, "use_sliding_window") else None


def _ropes(found: Json) -> tuple[Rope, Rope | None]:
    """The rotary positions of layers with full attention, and of those with a window where they differ."""
    fields = _object(found, "rope_parameters") or _object(found, "rope_scaling")
    local = {**found, "rope_theta": found.get("rope_local_base_freq", found["rope_theta"])}
    if set(fields) & set(get_args(LayerType)):  # newer files have one set for each type of layer
        rope, sliding = _rope(found, _object(fields, FULL)), _rope(local, _object(fields, SLIDING))
    else:
        rope = _rope(found, fields)
        sliding = _rope(local, {}) if "rope_local_base_freq" in found else rope
    return rope, None if sliding == rope else sliding


def _rope(found: Json, fields: Json) -> Rope:
    merged = {"partial_rotary_factor": 1.0, **found, **fields}
    kind = fields.get("rope_type", fields.get("type", "default"))
    if kind not in (*SCALINGS,):
        raise ValueError(
            f"it says rope_type {kind!r}, but only {', '.join(SCALINGS)} are supported. "
            "Choose a checkpoint without it."
        )
    theta, factor = _number(merged, "rope_theta"), _number(merged, "partial_rotary_factor")
    return Rope(theta, factor, SCALINGS[kind](found, fields))


def _plain_scaling(found: Json, fields: Json) -> None:
    return None


def _linear_scaling(found: Json, fields: Json) -> Scaling:
    return LinearScaling(_number(fields, "factor"))


def _llama3_scaling(found: Json, fields: Json) -> Scaling:
    return Llama3Scaling(
        factor=_number(fields, "factor"),
        low_freq_factor=_number(fields, "low_freq_factor"),
        high_freq_factor=_number(fields, "high_freq_factor"),
        original_max_position_embeddings=_whole(fields, "original_max_position_embeddings", 1),
    )


def _longrope_scaling(found: Json, fields: Json) -> Scaling:
    name, longest = "original_max_position_embeddings", _whole(found, "max_position_embeddings", 1)
    original = _whole({name: longest, **found, **fields}, name, 2)
    amplitude = fields.get("attention_factor")
    if amplitude is None:
        ratio = longest / original if original != longest else _number({"factor": 1.0, **fields}, "factor")
        amplitude = math.sqrt(1 + math.log(ratio) / math.log(original)) if ratio > 1 else 1.0
    return LongRopeScaling(
        short_factor=_numbers(fields, "short_factor"),
        long_factor=_numbers(fields, "long_factor"),
        amplitude=_number({"attention_factor": amplitude}, "attention_factor"),
        original_max_position_embeddings=min(original, longest),
        max_position_embeddings=longest,
    )


SCALINGS: dict[str, Callable[[Json, Json], Scaling | None]] = {
    "default": _plain_scaling,
    "linear": _linear_scaling,
    "llama3": _llama3_scaling,
    "longrope": _longrope_scaling,
    "su": _longrope_scaling,  # what longrope was called first
}


def _object(found: Json, name: str) -> Json:
    value = found.get(name)
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ValueError(f"{name} must be an object of fields, but came as {value!r}.")
    return value


def _number(found: Json, name: str) -> float:
    value = found.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f"{name} must be a positive number, but came as {value!r}.")
    return float(value)


def _numbers(found: Json, name: str) -> tuple[float, ...]:
    value = found.get(name)
    if not isinstance(value, list):
        raise ValueError(f"{name} must be a list of numbers, but came as {value!r}.")
    return tuple(_number({name: one}, name) for one in value)


def _whole(found: Json, name: str, least: int) -> int:
    value = found.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, but came as {value!r}.")
    return value


def _flag(found: Json, name: str) -> bool:
    value = found.get(name)
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be true or false, but came as {value!r}.")
    return value
