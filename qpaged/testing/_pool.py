"""The pools that the laws are tried on, and moving pages between them as a swap to the host does."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import qpaged

HEADS, PAGES, PAGE_SIZE = 2, 6, 8
MANY_PAGES = 32_768  # of the large pool, beside which anything that a step needs is small
BATCH = 2  # sequences that decode together
QUERIES, GROUP = 3, 2  # that attend together, and of each key/value head
TOKENS = 20  # of a sequence that lies on three pages, the last not full
TABLE = np.array([4, 1, 5], np.int32)  # two of them neighbours
ELSEWHERE = np.array([MANY_PAGES - 1, 17, 4000], np.int32)  # where it lies in the large pool
LARGEST_INDEX = 2**31 - 1
SMALLEST = 2.0**-125  # values below 2^-126 count as zero, and so may bounds
HEAD_DIMS = (16, 32, 64, 128, 256)  # that a format is asked for, the smallest first


@functools.cache
def head_dim(quantizer: qpaged.Quantizer) -> int:
    """The smallest head that the format takes."""
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
    """The configuration of a pool of so many pages."""
    heads = HEADS, head_dim(quantizer)
    return qpaged.PagedAttentionCacheMetaData(4, 1, pages, len(TABLE), TOKENS, PAGE_SIZE, *heads, 0.5)


def fresh(quantizer: qpaged.Quantizer, dtypes: tuple[Any, Any], pages: int = PAGES) -> Any:
    """A view in which nothing was written, with keys of one dtype and values of another."""
    config = configuration(quantizer, pages)
    init = qpaged.PagedAttentionCacheView.init
    views = {dtype: init(None, dtype, config, 0, None, quantizer) for dtype in dtypes}
    return views[dtypes[0]].replace(value_pages=views[dtypes[1]].value_pages)


def moved(view: Any, pages: np.ndarray, to: np.ndarray, count: int) -> Any:
    """The view with ``count`` pages in place of its own: its ``pages``, put at ``to``, every part of them."""

    def put(part):
        new = np.zeros((part.shape[0], count, *part.shape[2:]), part.dtype)
        new[:, to] = np.asarray(part)[:, pages]
        return jnp.array(new)

    metadata = view.metadata.replace(num_pages_per_layer=count)
    return jax.tree_util.tree_map(put, view).replace(metadata=metadata)


def pools(view: Any) -> tuple[tuple[str, Any], tuple[str, Any]]:
    """The pools of a view with their names."""
    return ("keys", view.key_pages), ("values", view.value_pages)


def parts(pages: Any) -> dict[str, np.ndarray]:
    """The stored parts of a pool by name."""
    names = ("codes", "scales", "outer", "offsets")
    return {name: np.asarray(part) for name in names if (part := getattr(pages, name)) is not None}


def differing(one: Any, other: Any, name: str) -> list[str]:
    """Which parts of two views' pools differ, in any bit."""
    here, there = (parts(dict(pools(view))[name]) for view in (one, other))
    return [
        f"the {part} of the {name}"
        for part in here
        if here[part].dtype != there[part].dtype or here[part].tobytes() != there[part].tobytes()
    ]


def different(one: Any, other: Any) -> list[str]:
    """Which parts of two views differ, in any bit."""
    return [part for name, _ in pools(one) for part in differing(one, other, name)]


def outside(part: np.ndarray, shape: Sequence[int], box: Sequence[tuple[int, int]]) -> np.ndarray:
    """A part of an array of ``shape``, with zeros for a box of elements, (from, to) by axis."""
    part = part.copy()
    spans = zip(part.shape, shape, box, strict=True)
    part[tuple(slice(low * n // length, -(-high * n // length)) for n, length, (low, high) in spans)] = 0
    return part
