"""The sizes that plan a cache, read also from checkpoints that cannot be loaded here."""

from dataclasses import dataclass
from pathlib import Path

from qpaged._files import read_json
from qpaged.models._json_fields import Json, read_object
from qpaged.models._rope_fields import read_ropes
from qpaged.models.checkpoint import find_config
from qpaged.models.config import FULL, SLIDING
from qpaged.models.families import DEFAULTS, FAMILIES, PARENTS, read_head_sizes
from qpaged.models.rope import YarnScaling

COUNTED_LAYERS = FULL, SLIDING, "chunked_attention"
"""Types of layers that keep the keys and values of all tokens, or could."""

UNLIKE_LAYERS = (
    "attn_layer_indices",
    "attn_layer_period",
    "full_attention_interval",
    "hybrid_override_pattern",
    "layers_block_type",
    "linear_attn_config",
    "num_kv_shared_layers",
)
"""Fields of models in which some layers have no keys and values of their own."""


@dataclass(frozen=True)
class CacheSizes:
    """The sizes of a model that say how large its cache is.

    Attributes:
        num_hidden_layers: layers, each with keys and values.
        num_key_value_heads: heads of these.
        head_dim: channels of a head.
        max_position_embeddings: the longest sequence that the model is made for, in tokens.
    """

    num_hidden_layers: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int


def read_cache_sizes(path: str | Path) -> CacheSizes:
    """Read the sizes of a model's cache from a checkpoint's directory, or its `config.json`, of any family.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a size is missing or malformed, or the cache is none of keys and values for each head of
            each layer.
    """
    path = find_config(path)
    fields = read_json(path)
    if not isinstance(fields, dict):
        raise ValueError(f"{path}: it must be a JSON object, but holds {fields!r:.60}. Copy the file again.")
    try:
        text: Json = {**fields, **read_object(fields, "text_config")}
        _check_countable(text)
        text = {**_defaults(text), **text}
        sizes = read_head_sizes(text)
        sizes["max_position_embeddings"] = _longest(text, sizes["max_position_embeddings"])
        return CacheSizes(**{name: sizes[name] for name in CacheSizes.__dataclass_fields__})
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _check_countable(text: Json) -> None:
    """Raise ValueError unless every layer has keys and values for each of its heads."""
    if text.get("kv_lora_rank"):
        raise ValueError("it has kv_lora_rank (MLA). qpaged plan cannot count the caches of such models.")
    unlike = [name for name in UNLIKE_LAYERS if text.get(name)]
    layer_types = text.get("layer_types")
    if isinstance(layer_types, list):
        unlike += [kind for kind in layer_types if kind not in COUNTED_LAYERS]
    if unlike:
        raise ValueError(
            f"it says {unlike[0]}, so some layers have no keys and values of their own, which plan does not "
            f"count."
        )


def _defaults(text: Json) -> Json:
    """Return what files of the model's family leave out, of any family if it is not known.

    Raises:
        ValueError: the family is not known, and the file does not say how many KV heads there are. Each has a
            rule and a name of its own for that, which may be one head for all (Falcon).
    """
    model_type = str(text.get("model_type"))
    family = FAMILIES.get(PARENTS.get(model_type, model_type))
    if family is not None:
        return {**DEFAULTS, **family.defaults}
    if text.get("num_key_value_heads") is None:
        raise ValueError(
            f"it lacks num_key_value_heads, which a model of type {model_type} may count in another way; add "
            f"the number to a copy of the file."
        )
    return DEFAULTS


def _longest(text: Json, max_position_embeddings: int) -> int:
    """Return the tokens of the longest sequence, which yarn extends."""
    try:
        rope, _ = read_ropes(text)
    except ValueError:  # positions of a kind that cannot be computed here, which is not needed
        return max_position_embeddings
    if isinstance(rope.scaling, YarnScaling):
        return rope.scaling.longest(max_position_embeddings)
    return max_position_embeddings
