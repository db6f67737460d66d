"""Writes a choice of formats as other serving engines read it, where they have formats that correspond."""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import qpaged

Layers: TypeAlias = Sequence[Sequence[str]]
"""The spellings of the keys' and the values' format of each layer."""

UNQUANTIZED = "raw"

MODELOPT = {
    ("fp8_e4m3:tensor", "fp8_e4m3:tensor"): "FP8",
    ("nvfp4", "nvfp4"): "NVFP4",
    ("fp8_e4m3:tensor", "nvfp4"): "FP8_K_NVFP4_V",
}
"""What NVIDIA ModelOpt names formats of keys and values."""

VLLM = {
    ("fp8_e4m3:tensor", "fp8_e4m3:tensor"): "fp8_e4m3",
    ("fp8_e5m2:tensor", "fp8_e5m2:tensor"): "fp8_e5m2",
    ("fp8_e4m3:token", "fp8_e4m3:token"): "fp8_per_token_head",
    ("int8:token", "int8:token"): "int8_per_token_head",
    ("nvfp4", "nvfp4"): "nvfp4",
}
"""What vLLM names formats of keys and values."""


def modelopt_config(layers: Layers) -> dict[str, Any]:
    """Return what ModelOpt writes as ``hf_quant_config.json`` of a checkpoint: schema 1 of its KV caches.

    Layers are named as those of Llama are, ``model.layers.0.self_attn``; those in bfloat16 are left out.

    Raises:
        ValueError: a layer has formats that ModelOpt does not have.
    """
    names = _names(layers, MODELOPT, "modelopt")
    different = set(names)
    (algorithm,) = different if len(different) == 1 else {"MIXED_PRECISION"}
    return {
        "producer": {"name": "qpaged", "version": qpaged.__version__},
        "quantization": {
            "quant_algo": None,
            "kv_cache_quant_algo": algorithm,
            "kv_cache_quantized_layers": {
                f"model.layers.{layer}.self_attn": {"quant_algo": name}
                for layer, name in enumerate(names)
                if name is not None
            },
            "kv_cache_schema_version": 1,
        },
    }


def vllm_options(layers: Layers) -> dict[str, Any]:
    """Return options of vLLM's ``LLM``: one format, and the layers that stay in bfloat16.

    Raises:
        ValueError: a layer has formats that vLLM does not have, or layers have several.
    """
    names = _names(layers, VLLM, "vllm")
    formats = sorted({name for name in names if name is not None})
    if len(formats) > 1:
        raise ValueError(
            f"--export vllm takes one format beside {UNQUANTIZED}, but layers have {', '.join(formats)}; "
            f"tune with one of them and {UNQUANTIZED} as --formats."
        )
    skipped = [str(layer) for layer, name in enumerate(names) if name is None]
    return {"kv_cache_dtype": formats[0] if formats else "auto", "kv_cache_dtype_skip_layers": skipped}


EXPORTS: dict[str, Callable[[Layers], dict[str, Any]]] = {"modelopt": modelopt_config, "vllm": vllm_options}
"""What a choice can be written as, by the engine that reads it."""


def _names(layers: Layers, known: dict[tuple[str, str], str], engine: str) -> list[str | None]:
    """Return how an engine names the formats of each layer; None for those that are not quantized."""
    found = {**known, (UNQUANTIZED, UNQUANTIZED): None}
    unlike = [layer for layer, (key, value) in enumerate(layers) if (key, value) not in found]
    if unlike:
        key, value = layers[unlike[0]]
        pairs = ", ".join(dict.fromkeys("/".join(dict.fromkeys(pair)) for pair in found))
        raise ValueError(
            f"--export {engine} takes layers in {pairs}, but layer {unlike[0]} has {key} keys and {value} "
            f"values ({len(unlike)} of {len(layers)} layers have others); tune with such --formats."
        )
    return [found[key, value] for key, value in layers]
