"""The arrays of a cache by names: those with a place for each page, and those beside them."""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from qpaged import pools
from qpaged.cache import PagedAttentionCache
from qpaged.pools import Pages

T = TypeVar("T")
Kind: TypeAlias = tuple[tuple[int, ...], np.dtype]
"""The shape and the dtype of an array."""

PAGE_AXIS = 1
STATIC_SCALES = "static_scales"


class NamedPool(NamedTuple):
    """A pool of a cache.

    Attributes:
        name: by which its arrays are named.
        pages: [kv_heads, pages, page_size, head_dim].
        kv_heads: those of the model, of which a pool may store copies.
    """

    name: str
    pages: Pages
    kv_heads: int


def pools_of(cache: PagedAttentionCache) -> Iterator[NamedPool]:
    """Yield the keys and the values of each layer."""
    for layer, view in enumerate(cache.views):
        kv_heads = view.metadata.num_kv_heads
        yield NamedPool(f"{layer}/key_pages", view.key_pages, kv_heads)
        yield NamedPool(f"{layer}/value_pages", view.value_pages, kv_heads)


def with_pools(cache: PagedAttentionCache, changed: Sequence[Pages]) -> PagedAttentionCache:
    """Return a cache with other pools, in the order of :func:`pools_of`."""
    pairs = zip(changed[::2], changed[1::2], strict=True)
    views = [
        view.replace(key_pages=keys, value_pages=values)
        for view, (keys, values) in zip(cache.views, pairs, strict=True)
    ]
    return cache.replace(views=views)


def of_all_pools(cache: PagedAttentionCache, parts_of: Callable[[Pages], Mapping[str, T]]) -> dict[str, T]:
    """Return the parts of all pools, named by pool and part."""
    arrays = {}
    for pool in pools_of(cache):
        arrays.update(named(pool.name, parts_of(pool.pages)))
    return arrays


def named(name: str, parts: Mapping[str, T]) -> dict[str, T]:
    """Return the parts of a pool, named by pool and part."""
    return {f"{name}/{part}": value for part, value in parts.items()}


def of_pool(name: str, parts: Mapping[str, T]) -> dict[str, T]:
    """Return the parts of one pool, from those of all."""
    prefix = f"{name}/"
    return {part.removeprefix(prefix): value for part, value in parts.items() if part.startswith(prefix)}


def page_parts(pool: Pages, pages: np.ndarray) -> dict[str, np.ndarray]:
    """Return what packed pages (n,) hold, each array as bits [kv_heads, n, ...] of its own."""
    taken = _take(pools.packed(pool), pages)
    return {name: to_bits(leaf) for name, leaf in _leaves_by_page(taken).items()}


def kinds_of_page_parts(pool: Pages) -> dict[str, Kind]:
    """Return shape and dtype of each array that :func:`page_parts` returns for one page."""
    taken = jax.eval_shape(_take, pools.packed(pool), jax.ShapeDtypeStruct((1,), jnp.int32))
    kinds = {}
    for name, leaf in _leaves_by_page(taken).items():
        width = np.prod(leaf.shape[PAGE_AXIS + 1 :], dtype=int)
        kinds[name] = ((*leaf.shape[: PAGE_AXIS + 1], int(width)), _bits_of(leaf.dtype))
    return kinds


def put_page_parts(
    pool: Pages,
    pages: np.ndarray,  # [n]
    parts: dict[str, np.ndarray],
) -> Pages:
    """Return a pool, which is donated, with the content of packed pages.

    Raises:
        ValueError: the parts are not those of such pages.
    """
    packed = pools.packed(pool)
    shapes = jax.eval_shape(_take, packed, pages)
    by_page = _leaves_by_page(shapes)
    check_names(parts, by_page)
    leaves = {name: from_bits(name, parts[name], leaf) for name, leaf in by_page.items()}
    flat, tree = jax.tree_util.tree_flatten_with_path(shapes)
    # What has no place for each page, as static scales, is not put: any array will do.
    taken = [leaves.get(_name(path), np.zeros(leaf.shape, leaf.dtype)) for path, leaf in flat]
    return pools.with_packed(pool, _put(packed, jax.tree_util.tree_unflatten(tree, taken), pages))


def parts_beside(pool: Pages) -> dict[str, jax.Array]:
    """Return the arrays of a pool that are of no single page: exact rows, what is noted of them, scales."""
    flat, _ = jax.tree_util.tree_flatten_with_path(_without_packed(pool))
    beside = {_name(path): leaf for path, leaf in flat}
    scales = pools.static_scales(pool)
    return beside if scales is None else {**beside, STATIC_SCALES: scales}


def kinds_beside(pool: Pages) -> dict[str, Kind]:
    """Return shape and dtype of each array of :func:`parts_beside`."""
    return {name: (leaf.shape, jnp.dtype(leaf.dtype)) for name, leaf in parts_beside(pool).items()}


def of_heads(
    held: Mapping[range, Mapping[str, np.ndarray]], wanted: range, kinds: Mapping[str, Kind]
) -> dict[str, np.ndarray]:
    """Return arrays of some KV heads from those of ranges of heads that cover them, in order.

    Args:
        held: the arrays of each range.
        wanted: the heads.
        kinds: shape and dtype of the arrays of the heads that are wanted.
    """
    for parts in held.values():
        check_names(parts, kinds)

    def of_array(name: str, shape: tuple[int, ...]) -> np.ndarray:
        pieces = []
        for heads, parts in held.items():
            array, own = parts[name], slice(wanted.start - heads.start, wanted.stop - heads.start)
            if len(shape) < 2 or shape[0] != len(wanted) or len(array) != len(heads):
                return array  # which is the same for all heads
            pieces.append(array[max(own.start, 0) : own.stop])
        return np.concatenate(pieces)

    return {name: of_array(name, shape) for name, (shape, _) in kinds.items()}


def bits_beside(pool: Pages) -> dict[str, np.ndarray]:
    """Return the arrays of :func:`parts_beside` as bits."""
    return {name: to_bits(leaf) for name, leaf in parts_beside(pool).items()}


def with_parts_beside(pool: Pages, parts: dict[str, np.ndarray]) -> Pages:
    """Return a pool with the arrays of :func:`parts_beside`, as bits.

    Raises:
        ValueError: they are not those of such a pool.
    """
    own = parts_beside(pool)
    check_names(parts, own)
    new = {}
    for name, leaf in own.items():
        new[name] = jax.device_put(from_bits(name, parts[name], leaf), leaf.sharding)
    flat, tree = jax.tree_util.tree_flatten_with_path(_without_packed(pool))
    beside = jax.tree_util.tree_unflatten(tree, [new[_name(path)] for path, _ in flat])
    made = pools.with_packed(beside, pools.packed(pool)) if flat else pool
    return pools.with_static_scales(made, new[STATIC_SCALES]) if STATIC_SCALES in new else made


def to_bits(leaf: jax.Array | np.ndarray) -> np.ndarray:
    """Return an array's bits as unsigned integers; those of one page in a row, however it lies in memory."""
    array = np.asarray(leaf)
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    if array.ndim > PAGE_AXIS + 1:
        array = array.reshape(*array.shape[: PAGE_AXIS + 1], -1)
    return np.ascontiguousarray(array).view(_bits_of(array.dtype))


def from_bits(name: str, bits: np.ndarray, like: jax.Array | jax.ShapeDtypeStruct) -> np.ndarray:
    """Return the array of which these are the bits.

    Raises:
        ValueError: they are not those of an array of this shape and dtype.
    """
    dtype = jnp.dtype(like.dtype)
    if bits.dtype != _bits_of(dtype) or bits.size != np.prod(like.shape, dtype=int):
        raise ValueError(
            f"{name} must be {like.shape} of {dtype.name}, but holds {bits.shape} of {bits.dtype.name}; it "
            f"was saved from a cache of other sizes."
        )
    return bits.view(dtype).reshape(like.shape)


def _bits_of(dtype: DTypeLike) -> np.dtype:
    """Return the unsigned integers that have the bits of a dtype."""
    return np.dtype(f"uint{8 * jnp.dtype(dtype).itemsize}")


def check_names(parts: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Raise ValueError unless the parts have the names of a cache's own."""
    if parts.keys() != own.keys():
        different = sorted(parts.keys() ^ own.keys())
        raise ValueError(
            f"files must hold the arrays of the cache that the manifest describes, but {different} are "
            f"missing or too many; it was written by another version of qpaged."
        )


def _without_packed(pool: Pages) -> Any:
    return pools.with_packed(pool, None)


def _leaves_by_page(taken: Any) -> dict[str, Any]:
    """Return the leaves of taken pages that have a place for each."""
    leaves, tree = jax.tree_util.tree_flatten(taken)
    kinds = tuple((leaf.shape, jnp.dtype(leaf.dtype)) for leaf in leaves)
    return {name: leaves[index] for name, index in _names_by_page(tree, kinds)}


@functools.lru_cache(maxsize=256)  # a pool is asked once for each file of its pages
def _names_by_page(tree: jax.tree_util.PyTreeDef, kinds: tuple[Kind, ...]) -> list[tuple[str, int]]:
    """Return the name and the number of each leaf of taken pages that has a place for each."""
    taken = jax.tree_util.tree_unflatten(tree, [jax.ShapeDtypeStruct(*kind) for kind in kinds])
    more = jax.eval_shape(_take, taken, jax.ShapeDtypeStruct((taken.shape[PAGE_AXIS] + 1,), jnp.int32))
    flat, _ = jax.tree_util.tree_flatten_with_path(taken)
    longer = jax.tree_util.tree_leaves(more)
    return [
        (_name(path), index)
        for index, ((path, leaf), other) in enumerate(zip(flat, longer, strict=True))
        if leaf.shape != other.shape
    ]


def _name(path: Any) -> str:
    return "/".join(str(getattr(key, "name", getattr(key, "key", key))) for key in path) or "values"


@jax.jit
def _take(packed: Pages, pages: jax.Array) -> Pages:
    return pools.take_pages(packed, pages, 1)


_put = jax.jit(pools.put_pages, donate_argnums=0)
