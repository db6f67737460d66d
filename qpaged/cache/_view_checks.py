"""Checks of what the methods of a view are given."""

import operator
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from qpaged import pools
from qpaged._arguments import as_array
from qpaged.arrays import dtype_of_floats
from qpaged.cache._config import PagedAttentionCacheMetaData
from qpaged.cache._fresh import fresh_pages
from qpaged.cache._slot_mapping import as_indices
from qpaged.implicit._tree import same_layout
from qpaged.pools import Pages, ValuesInKeys


def checked_layer(layer: Any, layers: int) -> int:
    """Return the number of a layer as a Python int, or raise ValueError unless there is such a layer."""
    try:
        index = -1 if isinstance(layer, bool) else operator.index(layer)
    except TypeError:  # it is no integer
        index = -1
    if not 0 <= index < layers:
        raise ValueError(
            f"layer_index must be one of the {layers} layers, counted from 0, but came as {layer!r}."
        )
    return index


def check_pages(
    name: str,
    pages: Pages,
    quantizer: Any,
    shape: tuple[int, int, int, int],
    metadata: PagedAttentionCacheMetaData,
) -> None:
    """Raise ValueError unless pages that were read are laid out as fresh ones of this format and shape."""
    dtype = dtype_of_floats(name, pages.dtype if metadata.dtype is None else metadata.dtype)
    fresh: Pages = ValuesInKeys(shape, dtype)
    if name == "key_pages" or not metadata.values_in_keys:
        fresh = jax.eval_shape(lambda: fresh_pages(quantizer, shape, dtype, metadata.sequences))
    if not same_layout(fresh, pages):
        raise ValueError(
            f"{name} must be {'plain' if quantizer is None else quantizer} pages of {dtype.name} and of the "
            f"metadata's shape {shape}, but holds {pools.format_of(pages) or 'plain'} pages of "
            f"{jnp.dtype(pages.dtype).name} and shape {tuple(pages.shape)}; the data was not written whole."
        )


def check_alike(name: str, own: Pages, taken: Pages) -> None:
    """Raise ValueError unless pages that were taken are like those of a pool, but for their number."""
    flat, other = pools.as_flat(own), pools.as_flat(taken)
    layers = [0 if pool is None or pool.layer is not None else pool.layers for pool in (flat, other)]
    own, taken = own if flat is None else flat.pages, taken if other is None else other.pages
    shapes = [(pages.shape[0], *pages.shape[2:]) for pages in (own, taken)]
    formats = [(pools.format_of(pages), jnp.dtype(pages.dtype)) for pages in (own, taken)]
    stored = [[jnp.dtype(leaf.dtype) for leaf in jax.tree_util.tree_leaves(pages)] for pages in (own, taken)]
    pairs = shapes, formats, stored, layers
    if any(of_own != of_taken for of_own, of_taken in pairs) or pools.kind_of(own) is not pools.kind_of(
        taken
    ):
        raise ValueError(
            f"taken must be pages of the same kind, but its {name} are {pools.describe(taken)}, and those of "
            f"this view {pools.describe(own)}; take them from a cache of the same format and sizes."
        )


def with_stored_heads(taken: Pages, own: Pages, kv_heads: int) -> Pages:
    """Return taken pages with as many copies of each head as a pool stores, if they are of its kind."""
    leaves, tree = jax.tree_util.tree_flatten(taken)
    likes = jax.tree_util.tree_leaves(own)
    if taken.shape[0] == own.shape[0] or len(likes) != len(leaves):
        return taken

    def of_heads(leaf: jax.Array, like: jax.Array) -> jax.Array:
        if min(leaf.ndim, like.ndim) < 2 or leaf.shape[0] == like.shape[0]:
            return leaf
        once = leaf[:: max(1, leaf.shape[0] // kv_heads)]
        return jnp.repeat(once, max(1, like.shape[0] // kv_heads), axis=0)

    return jax.tree_util.tree_unflatten(tree, map(of_heads, leaves, likes))


def page_indices(name: str, pages: ArrayLike) -> jax.Array:
    """Return pages as (n,) int32; a scalar becomes (1,)."""
    indices = jnp.atleast_1d(as_indices(name, pages))
    if indices.ndim != 1:
        raise ValueError(f"{name} must have shape (n,), but came with shape {indices.shape}.")
    return indices


def checked_keys_and_values(
    key: ArrayLike,
    value: ArrayLike | None,
    tokens: int,
    metadata: PagedAttentionCacheMetaData,
    position_name: str,
) -> tuple[jax.Array, jax.Array | None]:
    """Return the rows of so many tokens as arrays, or raise what is wrong with them.

    There are no values where they lie in the keys.
    """
    heads = metadata.num_kv_heads
    keys = checked_rows("key", key, (tokens, heads, metadata.kv_head_dim_size), position_name)
    if not metadata.values_in_keys:
        return keys, checked_rows("value", value, (tokens, heads, metadata.value_dim), position_name)
    if value is not None:
        raise ValueError(
            "value must be None for a cache whose values lie in the keys, but came as an array; write the "
            "keys, whose first channels are the values."
        )
    return keys, None


def checked_rows(name: str, rows: ArrayLike | None, shape: tuple[int, ...], position_name: str) -> jax.Array:
    """Return ``rows`` as an array, or raise unless they are floats of this shape."""
    rows = as_array(name, rows)
    if tuple(rows.shape) != shape:
        raise ValueError(
            f"{name} must have shape (len({position_name}), kv_heads, head_dim) = {shape}, but came with "
            f"shape {tuple(rows.shape)}."
        )
    dtype_of_floats(name, rows.dtype)  # raises TypeError unless it is one
    return rows
