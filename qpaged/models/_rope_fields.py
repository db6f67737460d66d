"""Read the rotary positions of a model from the fields of its `config.json`."""

import math
from collections.abc import Callable

from qpaged.models._json_fields import Json, read_flag, read_integer, read_number, read_numbers, read_object
from qpaged.models.config import FULL, SLIDING
from qpaged.models.rope import LinearScaling, Llama3Scaling, LongRopeScaling, Rope, Scaling, YarnScaling


def read_ropes(fields: Json) -> tuple[Rope, Rope | None]:
    """Return the rotary positions of full layers, and of those with a window if they differ."""
    # Newer files have rope_parameters alone. A rope_scaling that was added to one is meant to change it.
    rope_fields = {**read_object(fields, "rope_parameters"), **_changed_by_scaling(fields)}
    has_local_base = "rope_local_base_freq" in fields
    local_fields = fields
    if has_local_base:
        local_fields = {**fields, "rope_theta": fields["rope_local_base_freq"]}
    if FULL in rope_fields or SLIDING in rope_fields:  # newer files have one set for each type of layer
        rope = _read_rope(fields, read_object(rope_fields, FULL))
        sliding_rope = _read_rope(local_fields, read_object(rope_fields, SLIDING))
    else:
        rope = _read_rope(fields, rope_fields)
        # Gemma 3 scales the positions of its full layers alone, so the local ones are read without scaling.
        sliding_rope = _read_rope(local_fields, {}) if has_local_base else rope
    if sliding_rope == rope:
        return rope, None
    return rope, sliding_rope


def _changed_by_scaling(fields: Json) -> Json:
    """Return the fields of ``rope_scaling``, for full layers alone if each type of layer has its own."""
    scaling = read_object(fields, "rope_scaling")
    parameters = read_object(fields, "rope_parameters")
    if FULL not in parameters or not scaling or FULL in scaling:
        return scaling
    return {FULL: {**read_object(parameters, FULL), **scaling}}


def _read_rope(fields: Json, rope_fields: Json) -> Rope:
    """Return rotary positions: ``rope_fields`` are those about positions, before any others of the file."""
    rope_type = rope_fields.get("rope_type", rope_fields.get("type", "default"))
    # Compared in a tuple, as a malformed type may be a list, which is not hashable.
    if rope_type not in tuple(SCALINGS):
        raise ValueError(
            f"it says rope_type {rope_type!r}, but only {', '.join(SCALINGS)} are supported. "
            "Choose a checkpoint without it."
        )
    merged = {"partial_rotary_factor": 1.0, **fields, **rope_fields}
    return Rope(
        theta=read_number(merged, "rope_theta"),
        partial_rotary_factor=read_number(merged, "partial_rotary_factor"),
        scaling=SCALINGS[rope_type](fields, rope_fields),
    )


def _no_scaling(fields: Json, rope_fields: Json) -> None:
    return None


def _dynamic_scaling(fields: Json, rope_fields: Json) -> None:
    """Return None: it scales sequences that are longer than the model is made for; the factor is checked."""
    read_number(rope_fields, "factor")


def _linear_scaling(fields: Json, rope_fields: Json) -> Scaling:
    return LinearScaling(read_number(rope_fields, "factor"))


def _llama3_scaling(fields: Json, rope_fields: Json) -> Scaling:
    return Llama3Scaling(
        factor=read_number(rope_fields, "factor"),
        low_freq_factor=read_number(rope_fields, "low_freq_factor"),
        high_freq_factor=read_number(rope_fields, "high_freq_factor"),
        original_max_position_embeddings=read_integer(rope_fields, "original_max_position_embeddings", 1),
    )


def _longrope_scaling(fields: Json, rope_fields: Json) -> Scaling:
    longest = read_integer(fields, "max_position_embeddings", 1)
    name = "original_max_position_embeddings"
    original = read_integer({name: longest, **fields, **rope_fields}, name, 2)
    return LongRopeScaling(
        short_factor=read_numbers(rope_fields, "short_factor"),
        long_factor=read_numbers(rope_fields, "long_factor"),
        amplitude=_longrope_amplitude(rope_fields, longest, original),
        original_max_position_embeddings=min(original, longest),
        max_position_embeddings=longest,
    )


def _longrope_amplitude(rope_fields: Json, longest: int, original: int) -> float:
    """Return the factor of queries and keys: sqrt(1 + ln(longest / original) / ln(original)).

    The source is Ding et al. 2024. A file may have a factor of its own.
    """
    if rope_fields.get("attention_factor") is not None:
        return read_number(rope_fields, "attention_factor")
    ratio = longest / original
    if longest == original:  # some files state the ratio alone
        ratio = read_number({"factor": 1.0, **rope_fields}, "factor")
    if ratio <= 1:
        return 1.0
    return math.sqrt(1 + math.log(ratio) / math.log(original))


def _yarn_scaling(fields: Json, rope_fields: Json) -> Scaling:
    factor = read_number(rope_fields, "factor")
    longest = {"original_max_position_embeddings": fields.get("max_position_embeddings")}
    given = {name: value for name, value in rope_fields.items() if value is not None}
    options = {"beta_fast": 32.0, "beta_slow": 1.0, **longest, **given}
    # As transformers reads it, null is false where a missing field is true.
    truncate = {"truncate": "truncate" not in rope_fields, **given}
    return YarnScaling(
        factor=factor,
        original_max_position_embeddings=read_integer(options, "original_max_position_embeddings", 1),
        amplitude=_yarn_amplitude(given, factor),
        beta_fast=read_number(options, "beta_fast"),
        beta_slow=read_number(options, "beta_slow"),
        truncate=read_flag(truncate, "truncate"),
    )


def _yarn_amplitude(rope_fields: Json, factor: float) -> float:
    """Return the factor of queries and keys: 1 + 0.1 · ln(factor), unless a file gives or weighs it."""
    if "attention_factor" in rope_fields:
        return read_number(rope_fields, "attention_factor")
    log_factor = 0.1 * math.log(max(factor, 1.0))
    if rope_fields.get("mscale") and rope_fields.get("mscale_all_dim"):
        all_dims = 1 + read_number(rope_fields, "mscale_all_dim") * log_factor
        return (1 + read_number(rope_fields, "mscale") * log_factor) / all_dims
    return 1 + log_factor


SCALINGS: dict[str, Callable[[Json, Json], Scaling | None]] = {
    "default": _no_scaling,
    "dynamic": _dynamic_scaling,
    "linear": _linear_scaling,
    "llama3": _llama3_scaling,
    "longrope": _longrope_scaling,
    "su": _longrope_scaling,  # longrope's first name
    "yarn": _yarn_scaling,
}
