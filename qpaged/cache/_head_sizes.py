"""The sizes of heads, where layers of a model differ in them."""

from collections.abc import Iterable, Mapping
from typing import NamedTuple, TypeAlias

from qpaged._arguments import positive, shown, whole_number


class HeadSizes(NamedTuple):
    """The KV heads of a layer, and their sizes.

    Attributes:
        num_kv_heads: key/value heads.
        kv_head_dim_size: the size of a head.
        value_head_dim_size: the size of a head of values; None if it is that of keys.
    """

    num_kv_heads: int
    kv_head_dim_size: int
    value_head_dim_size: int | None = None


LayerSizes: TypeAlias = tuple[tuple[int, HeadSizes], ...]
"""Layers and their sizes, in ascending order."""


def checked_layer_sizes(
    layer_sizes: Mapping[int, HeadSizes] | LayerSizes, usual: HeadSizes, num_layers: int
) -> LayerSizes:
    """Return the sizes of layers that do not have the usual ones, or raise what is wrong with them."""
    pairs = _pairs(layer_sizes)
    if pairs is None:
        raise TypeError(
            f"layer_sizes must be a mapping from layers to qpaged.HeadSizes, but got {shown(layer_sizes)}; "
            f"give {{5: HeadSizes(num_kv_heads=4, kv_head_dim_size=512)}}, say."
        )
    sizes: dict[int, HeadSizes] = {}
    for layer, of_layer in pairs:
        number = whole_number("layer_sizes", layer)
        if not 0 <= number < num_layers:
            raise ValueError(
                f"layer_sizes must name layers of the model's {num_layers}, counted from 0, but names "
                f"{number}."
            )
        if number in sizes:
            raise ValueError(f"layer_sizes must name each layer once, but names {number} again.")
        kv_heads, head_dim, *value_dim = of_layer
        of_values = value_dim[0] if value_dim else None
        sizes[number] = HeadSizes(
            positive(f"num_kv_heads of layer {number}", kv_heads),
            positive(f"kv_head_dim_size of layer {number}", head_dim),
            None if of_values is None else positive(f"value_head_dim_size of layer {number}", of_values),
        )
    return tuple((layer, sizes[layer]) for layer in sorted(sizes) if sizes[layer] != usual)


def _pairs(layer_sizes: object) -> list[tuple[object, tuple[object, ...]]] | None:
    """Return layers and their sizes, as they are written or as records have them; None if they are none."""
    pairs = layer_sizes.items() if isinstance(layer_sizes, Mapping) else layer_sizes
    if isinstance(pairs, str) or not isinstance(pairs, Iterable):
        return None
    found = []
    for pair in pairs:
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            return None
        layer, sizes = pair
        if not isinstance(sizes, tuple | list) or len(sizes) not in (2, 3):
            return None
        found.append((layer, tuple(sizes)))
    return found
