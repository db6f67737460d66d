"""The static scales of a cache as checkpoints carry them: tensors beside the weights of each layer."""

import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from qpaged._arguments import shown
from qpaged._extras import need
from qpaged._files import write_whole
from qpaged.formats import CacheScales
from qpaged.models._safetensors import DTYPES, StoredTensor, file_tensors, stored_tensors

FORMAT = "fp8_e4m3"  # what the scales of checkpoints are for
SUFFIX = ".safetensors"
NAME = "model.layers.{layer}.self_attn.{side}_scale"
ATTENTION = r"(.*\.)?layers\.(?P<layer>\d+)\.(self_attn|attn)\."
NAMES = (
    re.compile(rf"{ATTENTION}((attn|[kv]_proj|qkv_proj)\.)?(?P<side>k|v|kv|q)_scale"),
    re.compile(rf"{ATTENTION}(?P<side>[kv])_proj\.output_scale"),
)
"""Names under which checkpoints carry scales; those of q are for attention in fp8, and not of a cache."""

MOST_LISTED = 8  # layers in a message

Sides = dict[str, dict[int, np.ndarray]]
"""The scales of each side, k and v, by layer: (1,) or (kv_heads,)."""


def is_cache_scale(name: str) -> bool:
    """Return True for the name of a tensor of a checkpoint that scales a cache, and no weight."""
    return _match(name) is not None


def read_scales(path: str | Path) -> CacheScales:
    """Read static scales: from a JSON file, a safetensors file, or the directory of a checkpoint.

    Tensors are found by name: ``k_scale`` and ``v_scale`` of each layer's attention, also below ``attn`` or
    its projections, the ``output_scale`` of ``k_proj`` and ``v_proj``, or one ``kv_scale`` for both.

    Raises:
        OSError: there is no such file.
        ValueError: it has no scales, or not those of all layers.
        ImportError: safetensors is missing.
    """
    path = Path(path)
    if path.suffix == ".json":
        return CacheScales.load(path)
    if path.suffix not in ("", SUFFIX) and not path.is_dir():
        raise ValueError(
            f"path must be a .json or {SUFFIX} file, or the directory of a checkpoint, but came as "
            f"{str(path)!r}."
        )
    if path.is_dir():
        tensors: Iterable[StoredTensor] = stored_tensors(path).values()
    else:
        tensors = file_tensors(path)
    sides = _sides(path, tensors)
    return CacheScales(_stacked(path, "k", sides), _stacked(path, "v", sides), FORMAT)


def write_scales(path: str | Path, scales: CacheScales) -> None:
    """Write static scales: as JSON, or to a safetensors file as the tensors that checkpoints carry.

    There, ``model.layers.N.self_attn.k_scale`` and ``v_scale`` are float32 of shape (1,) or (kv_heads,).

    Raises:
        OSError: the file cannot be written.
        TypeError: other scales than a ``CacheScales``.
        ValueError: another kind of file, or tensors for another format than fp8_e4m3.
        ImportError: safetensors is missing.
    """
    path = Path(path)
    if not isinstance(scales, CacheScales):
        raise TypeError(f"scales must be a qpaged.CacheScales, but got {shown(scales)}.")
    check_scales_file(path, scales.format)
    if path.suffix == ".json":
        scales.save(path)
        return
    tensors = {}
    for side, values in (("k", scales.key), ("v", scales.value)):
        for layer, of_layer in enumerate(values):
            tensors[NAME.format(layer=layer, side=side)] = np.atleast_1d(of_layer)
    write_whole(path, need("safetensors.numpy").save(tensors, metadata={"format": "pt"}))


def check_scales_file(path: Path, chosen_for: str) -> None:
    """Raise ValueError unless a file of this name can hold scales that were chosen for a format."""
    if path.suffix not in (".json", SUFFIX):
        raise ValueError(f"path must end in .json or {SUFFIX}, but came as {str(path)!r}.")
    if path.suffix == SUFFIX and chosen_for not in (FORMAT, f"{FORMAT}/{FORMAT}"):
        raise ValueError(
            f"scales must be for {FORMAT} in a safetensors file, as those of checkpoints are, but are for "
            f"{chosen_for}; write them to a .json file."
        )


def _match(name: str) -> re.Match[str] | None:
    matches = (pattern.fullmatch(name) for pattern in NAMES)
    return next((match for match in matches if match is not None), None)


def _sides(path: Path, tensors: Iterable[StoredTensor]) -> Sides:
    """Return the scales among the tensors of a checkpoint."""
    sides: Sides = {"k": {}, "v": {}}
    shared: dict[int, np.ndarray] = {}
    for tensor in tensors:
        match = _match(tensor.name)
        if match is None or match["side"] == "q":
            continue
        if tensor.dtype not in DTYPES:
            raise ValueError(
                f"{path} stores {tensor.name!r} as {tensor.dtype}, but only {', '.join(DTYPES)} can be read."
            )
        of_side, layer = sides.get(match["side"], shared), int(match["layer"])
        scales = np.asarray(tensor.read("float32")).reshape(-1)
        before = of_side.setdefault(layer, scales)
        if not np.array_equal(before, scales):
            raise ValueError(
                f"{path} must have one {match['side']}_scale for each layer, but {tensor.name!r} is "
                f"another one of layer {layer}; give a file with those of the decoder alone."
            )
    return {side: {**shared, **of_layers} for side, of_layers in sides.items()}


def _listed(layers: list[int]) -> str:
    """Return some layers in words."""
    if len(layers) <= MOST_LISTED:
        return f"layers {layers}"
    return f"layers {layers[:MOST_LISTED]} and {len(layers) - MOST_LISTED} more"


def _stacked(path: Path, side: str, sides: Sides) -> np.ndarray:
    """Return the scales of a side, (layers,) or (layers, kv_heads)."""
    by_layer = sides[side]
    layers = range(1 + max((layer for of_side in sides.values() for layer in of_side), default=0))
    missing = [layer for layer in layers if layer not in by_layer]
    if missing:
        raise ValueError(
            f"{path} must have scales of every layer, as {NAME.format(layer=missing[0], side=side)}, but has "
            f"none of {_listed(missing)} for {side}; give a checkpoint that was made for a quantized cache, "
            f"or what qpaged calibrate wrote."
        )
    heads = max(len(scales) for scales in by_layer.values())
    if any(len(scales) not in (1, heads) for scales in by_layer.values()):
        raise ValueError(f"{path} must have as many {side}_scale in each layer; copy the file again.")
    stacked = np.stack([np.broadcast_to(by_layer[layer], heads) for layer in layers])
    return stacked[:, 0] if heads == 1 else stacked
