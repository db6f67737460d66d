"""The pools that the laws are checked on, and the comparison and moving of their pages."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

import qpaged

HEADS, PAGES, PAGE_SIZE = 2, 6, 8
MANY_PAGES = 32_768  # of the large pool, beside which anything that a step needs is small
BATCH = 2  # sequences that decode together
QUERIES = 3  # rows of an attention step
GROUP = 2  # query heads per KV head
TOKENS = 20  # of a sequence on three pages, the last of which is not full
TABLE = np.array([4, 1, 5], np.int32)  # the sequence's page table in the small pool; 4 and 5 are neighbours
LARGE_TABLE = np.array([MANY_PAGES - 1, 17, 4000], np.int32)  # its page table in the large pool
SMALL_DTYPES = (jnp.float32, jnp.float16)  # of keys and of values in the small pool
LARGE_DTYPES = (jnp.float32, jnp.bfloat16)
LARGEST_INDEX = 2**31 - 1
SMALLEST = 2.0**-125  # values below 2^-126 count as zero, and so may bounds
HEAD_DIMS = (16, 32, 64, 128, 256)  # tried in this order, since groups must divide head_dim
STATIC_SCALES = {  # of two heads; no powers of two, so that a code shows which of them it is under
    "keys": np.array([0.013, 0.03], np.float32),
    "values": np.array([0.021, 0.0101], np.float32),
}
PARTS = ("codes", "scales", "global_scale", "offset")

View = qpaged.PagedAttentionCacheView
Pages = Any
"""The key or value pages of a view: a QuantizedArray, though a faulty format may leave something else."""


@functools.cache
def head_dim(quantizer: qpaged.Quantizer) -> int:
    """Return the smallest of ``HEAD_DIMS`` that the format accepts."""
    for size in HEAD_DIMS:
        try:
            jax.eval_shape(lambda: quantizer.empty((HEADS, PAGES, PAGE_SIZE, size), jnp.float32))  # noqa: B023
        except ValueError:
            if size == HEAD_DIMS[-1]:
                raise
        else:
            break
    return size


def configuration(quantizer: qpaged.Quantizer, pages: int = PAGES) -> qpaged.PagedAttentionCacheMetaData:
    """Return the configuration of a one-layer cache of ``pages`` pages."""
    return qpaged.PagedAttentionCacheMetaData(
        batch_size=4,
        num_hidden_layers=1,
        num_pages_per_layer=pages,
        num_pages_per_sequence=len(TABLE),
        max_sequences=TOKENS,
        page_size=PAGE_SIZE,
        num_kv_heads=HEADS,
        kv_head_dim_size=head_dim(quantizer),
        hbm_utilization=0.5,
    )


def fresh(quantizer: qpaged.Quantizer, dtypes: tuple[DTypeLike, DTypeLike], pages: int = PAGES) -> View:
    """Return a view in which nothing was written, with keys of one dtype and values of another."""
    config = configuration(quantizer, pages)
    key_view = View.init(None, dtypes[0], config, 0, None, quantizer)
    value_view = View.init(None, dtypes[1], config, 0, None, quantizer)
    return with_static_scales(key_view.replace(value_pages=value_view.value_pages))


def with_static_scales(view: View) -> View:
    """Return a fresh view with static scales that differ between keys and values, and between heads."""
    given = []
    for name, pages in zip(("keys", "values"), (view.key_pages, view.value_pages), strict=True):
        before = qpaged.pools.static_scales(pages)
        given.append(None if before is None else np.resize(STATIC_SCALES[name], before.size))
    return view.with_scales(*given)


def has_static(pages: Pages, part: str) -> bool:
    """Return True if a part of a pool is its static scales, which are no page's own."""
    return part == "scales" and qpaged.pools.static_scales(pages) is not None


def move_pages(view: View, source: np.ndarray, target: np.ndarray, count: int) -> View:
    """Return the view with a pool of ``count`` zeroed pages, into which ``source`` is copied at ``target``.

    All stored parts of a page move together, as they do when a server swaps pages to the host. What the pages
    share, static scales, is copied.
    """
    num_pages = view.metadata.num_pages_per_layer

    def move(part: jax.Array) -> jax.Array:
        if part.shape[1] != num_pages:
            return jnp.array(part)
        pool = np.zeros((part.shape[0], count, *part.shape[2:]), part.dtype)
        pool[:, target] = np.asarray(part)[:, source]
        return jnp.array(pool)

    metadata = view.metadata.replace(num_pages_per_layer=count)
    return jax.tree_util.tree_map(move, view).replace(metadata=metadata)


def same_structure(one: object, other: object) -> bool:
    """Return True if two pytrees have the same structure, formats included."""
    one_structure: Any = jax.tree_util.tree_structure(one)
    other_structure: Any = jax.tree_util.tree_structure(other)
    return bool(one_structure == other_structure)


def pools(view: View) -> tuple[tuple[str, Pages], tuple[str, Pages]]:
    """Return the pools of a view with their names."""
    return ("keys", view.key_pages), ("values", view.value_pages)


def parts(pages: Pages) -> dict[str, np.ndarray]:
    """Return the stored parts of a pool by name."""
    return {name: np.asarray(getattr(pages, name)) for name in PARTS if getattr(pages, name) is not None}


def pool_differences(one: View, other: View, name: str) -> list[str]:
    """Return the parts of the keys, or of the values, that differ between two views in any bit."""
    parts_of_one = parts(dict(pools(one))[name])
    parts_of_other = parts(dict(pools(other))[name])
    differences = []
    for part, array in parts_of_one.items():
        counterpart = parts_of_other[part]
        if array.dtype != counterpart.dtype or array.tobytes() != counterpart.tobytes():
            differences.append(f"the {part} of the {name}")
    return differences


def differences(one: View, other: View) -> list[str]:
    """Return the parts that differ between two views in any bit."""
    return pool_differences(one, other, "keys") + pool_differences(one, other, "values")


def zero_inside(part: np.ndarray, shape: Sequence[int], box: Sequence[tuple[int, int]]) -> np.ndarray:
    """Return a stored part with zeros wherever it belongs to a box of elements.

    Args:
        part: codes or scales of an array; along each axis one entry may cover several elements.
        shape: the shape of that array.
        box: (from, to) in elements of the array, for each axis.
    """
    part = part.copy()
    slices = []
    for stored, length, (low, high) in zip(part.shape, shape, box, strict=True):
        slices.append(slice(low * stored // length, -(-high * stored // length)))
    part[tuple(slices)] = 0
    return part
