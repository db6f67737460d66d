"""The sizes that plan a cache, read also from checkpoints that cannot be loaded here."""

from dataclasses import dataclass
from math import prod
from pathlib import Path

import jax.numpy as jnp

from qpaged.models._json_fields import Json, read_object
from qpaged.models._safetensors import read_json
from qpaged.models.checkpoint import find_config, read_config
from qpaged.models.decoder import param_shapes
from qpaged.models.families import DEFAULTS, FAMILIES, PARENTS, read_head_sizes

PATTERNS = "model*.safetensors", "consolidated*.safetensors", "pytorch_model*.bin", "consolidated*.pth"
"""Files that weights are stored in; a directory may hold the same weights under several of these."""
DTYPE_NAMES = "dtype", "torch_dtype"


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
        ValueError: a size is missing or malformed, or the cache is none of keys and values for each head.
    """
    path = find_config(path)
    fields = read_json(path)
    if not isinstance(fields, dict):
        raise ValueError(f"{path}: it must be a JSON object, but holds {fields!r:.60}. Copy the file again.")
    try:
        text = {**fields, **read_object(fields, "text_config")}
        if text.get("kv_lora_rank"):
            raise ValueError("it has kv_lora_rank (MLA). qpaged plan cannot count the caches of such models.")
        sizes = read_head_sizes({**_defaults(fields), **text})
        return CacheSizes(**{name: sizes[name] for name in CacheSizes.__dataclass_fields__})
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _defaults(fields: Json) -> Json:
    """Return what files of the model's family leave out, of any family if it is not known."""
    model_type = str(fields.get("model_type"))
    family = FAMILIES.get(PARENTS.get(model_type, model_type))
    return DEFAULTS if family is None else {**DEFAULTS, **family.defaults}


def weights_bytes(path: str | Path) -> tuple[int, str]:
    """Return the bytes of a checkpoint's weights, and where the number comes from.

    It is the size of the files, of whatever kind. A configuration without weights has them computed.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        ValueError: there are no files, and the weights of such a model cannot be computed.
    """
    path = find_config(path)
    for pattern in PATTERNS:
        files = sorted(path.parent.glob(pattern))
        if files:
            names = files[0].name if len(files) == 1 else f"{len(files)} files {pattern}"
            return sum(file.stat().st_size for file in files), f"the size of {names}"
    fields = read_json(path)
    stored_as = next((fields[name] for name in DTYPE_NAMES if fields.get(name)), "bfloat16")
    try:
        itemsize = jnp.dtype(str(stored_as).removeprefix("torch.")).itemsize
        count = sum(prod(shape) for shape in param_shapes(read_config(path)).values())
    except (TypeError, ValueError) as error:
        reason = str(error).partition(". ")[0].rstrip(".")  # without its advice to choose another file
        raise ValueError(
            f"{path.parent} has no weights, and their bytes cannot be computed ({reason}). Give the bytes, "
            f"as in --weights 16GB."
        ) from error
    return count * itemsize, f"computed from {path.name}, as {stored_as}"
