"""PartlyExact: a quantized array some of whose pages, runs along an axis, are held as they were written, too.

What a pool with exact pages is to qpaged's own cache, for arrays whose tokens lie one behind the other. Codes
are at all times those of everything that their page holds, so that where a read cannot tell a page exact, its
codes do.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.tree_util import GetAttrKey
from jax.typing import DTypeLike

from qpaged._compat import Location
from qpaged._promotion import promoting_ranks
from qpaged.arrays._blocks import block_max
from qpaged.arrays._exact_places import NO_PAGE, Places
from qpaged.arrays._plain_use import PlainUse
from qpaged.arrays._protocol import ArrayFormat
from qpaged.arrays._quantize import empty, overwrite, quantize
from qpaged.arrays._quantized import QuantizedArray
from qpaged.implicit import ImplicitArray, aux_field, materialize_nested


@dataclass(eq=False, repr=False)
class PartlyExact(PlainUse, ImplicitArray):
    """An array of codes beside which some pages are held as they were written.

    Attributes:
        codes: the whole array, quantized, or what lazy reads have made of it.
        rows: the exact pages one behind the other along ``axis``, and otherwise as ``codes``.
        page: int32; which page each of the exact ones is, :data:`NO_PAGE` if none. 1 long along the channels,
            and along the other axes as long as ``codes``, or 1.
        axis: static; the axis of the tokens, counted from the end.
        sinks: static; how many of the exact pages are the array's first. The others are a ring.
    """

    codes: Any
    rows: Any
    page: jax.Array
    axis: int = aux_field()
    sinks: int = aux_field()

    __eq__ = PlainUse.__eq__
    __hash__ = object.__hash__

    def __post_init__(self) -> None:
        """Nothing to infer: shape and dtype are those of the codes."""

    @property  # type: ignore[misc]  # in place of fields, as the base class allows
    def shape(self) -> tuple[int, ...]:
        shape: tuple[int, ...] = self.codes.shape
        return shape

    @shape.setter
    def shape(self, _: Any) -> None:
        """Ignored: it would go stale."""

    @property  # type: ignore[misc]
    def dtype(self) -> Any:
        return self.codes.dtype

    @dtype.setter
    def dtype(self, _: Any) -> None:
        """Ignored: it would go stale."""

    @property
    def tokens(self) -> int:
        """:attr:`axis`, counted from the front."""
        return self.axis % self.ndim

    @property
    def places(self) -> Places:
        """Where its exact pages are held."""
        count = self.page.shape[self.axis]
        return Places(self.shape[self.axis], self.rows.shape[self.axis] // count, count, self.sinks)

    @property
    def quantizer(self) -> ArrayFormat:
        """The format of the codes."""
        quantizer: ArrayFormat = self.codes.quantizer
        return quantizer

    @property
    def block(self) -> tuple[int, ...]:
        """Extents of the box of codes that share one scale."""
        block: tuple[int, ...] = self.codes.block
        return block

    @property
    def nbytes(self) -> int:
        """Bytes of codes, exact rows and page numbers."""
        return sum(leaf.nbytes for leaf in jax.tree_util.tree_leaves(self))

    def __repr__(self) -> str:
        return f"PartlyExact({self.codes}, rows {self.rows}, {self.places.num_pages} pages)"

    def tree_flatten_with_keys(self) -> tuple[list[tuple[Any, Any]], tuple[Any, ...]]:
        # Down to the arrays, so that handlers are given codes and rows as they are, and not as dense ones.
        parts = {"codes": self.codes, "rows": self.rows, "page": self.page}
        children, structures = [], []
        for name, part in parts.items():
            leaves, structure = jax.tree_util.tree_flatten_with_path(part)
            children += [(GetAttrKey(_joined(name, keys)), leaf) for keys, leaf in leaves]
            structures.append(structure)
        return children, (tuple(structures), self.axis, self.sinks)

    @classmethod
    def tree_unflatten(cls, aux_data: Any, children: Any) -> "PartlyExact":
        structures, axis, sinks = aux_data
        remaining = iter(children)
        parts = []
        for structure in structures:
            leaves = [next(remaining) for _ in range(structure.num_leaves)]
            parts.append(jax.tree_util.tree_unflatten(structure, leaves))
        codes, rows, page = parts
        return cls(codes, rows, page, axis, sinks)

    def like(self, codes: Any, rows: Any, page: jax.Array, axis: int | None = None) -> "PartlyExact":
        """Return an array of these parts, whose tokens are on ``axis`` from the start, or where they were."""
        return PartlyExact(
            codes, rows, page, self.axis if axis is None else axis - len(codes.shape), self.sinks
        )

    def explicit_sharding(self) -> Any:
        """Return the sharding on a mesh with Explicit axes, which is that of the codes; None elsewhere."""
        return self.codes.explicit_sharding()

    def deferred(self) -> tuple[str, Location | None] | None:
        """Return what the codes defer."""
        return self.codes.deferred() if isinstance(self.codes, ImplicitArray) else None

    @promoting_ranks
    def materialize(self) -> jax.Array:
        """Return the values: of pages that are held as they were written, of others from the codes."""
        codes, rows = (materialize_nested(part, full=True) for part in (self.codes, self.rows))
        return jnp.where(self.is_exact(), self.places.spread(rows, self.tokens), codes)

    def is_exact(self) -> jax.Array:
        """Return True for tokens whose page is held: bool, as long as ``page`` along the other axes."""
        places = self.places
        pages = np.arange(-(-places.length // places.page_size), dtype=np.int32)
        expected = pages.reshape([-1 if axis == self.tokens else 1 for axis in range(self.ndim)])
        is_held = jnp.take(self.page, places.of_page(pages), axis=self.tokens) == expected
        of_tokens = jnp.repeat(is_held, places.page_size, axis=self.tokens)
        return lax.slice_in_dim(of_tokens, 0, places.length, axis=self.tokens)

    def at_rows(self, x: jax.Array) -> jax.Array:
        """Return what ``x``, plain and as long as the array along the tokens, has at the rows."""
        places = self.places
        tokens = places.page_size * jnp.repeat(self.page, places.page_size, axis=self.tokens)
        tokens += lax.broadcasted_iota(jnp.int32, tokens.shape, self.tokens) % places.page_size
        return jnp.take_along_axis(x, jnp.clip(tokens, 0, places.length - 1), axis=self.tokens)


def _joined(name: str, keys: Sequence[Any]) -> str:
    """Return the name of a leaf of a part: that of the part, and of the child in it."""
    return "_".join([name, *(str(getattr(key, "name", key)) for key in keys)])


def is_cache_array(leaf: Any) -> bool:
    """Return True for a quantized array as a cache holds it, with exact pages or without."""
    codes = leaf.codes if isinstance(leaf, PartlyExact) else leaf
    return isinstance(codes, QuantizedArray)


@promoting_ranks
def quantize_written(
    array: jax.Array | np.ndarray, quantizer: ArrayFormat, block: Sequence[int], channel_axis: int
) -> QuantizedArray:
    """Return an array quantized, with scale 0 for blocks of zeros.

    A block into which nothing was written yet has scale 0, and reads as exact zeros. With any other scale it
    would not: codes of formats such as `int8` stand for odd multiples of half the scale.
    """
    quantized = quantize(array, quantizer, block, array.dtype, channel_axis)
    if quantized.scales is None:
        return quantized
    is_written = block_max(jnp.abs(array), quantized.scales.shape) != 0  # NaN is, too
    scales = jnp.where(is_written, quantized.scales, 0).astype(quantized.scales.dtype)
    return quantized.like(quantized.codes, quantized.parts._replace(scales=scales))


def empty_with_exact_pages(
    shape: Sequence[int],
    quantizer: ArrayFormat,
    raw: ArrayFormat,
    block: Sequence[int],
    dtype: DTypeLike,
    channel_axis: int,
    axis: int,
    places: Places,
) -> PartlyExact:
    """Return an array in which nothing was written yet, none of whose pages is held.

    Args:
        shape: of the array.
        quantizer: the format of the codes.
        raw: the format of the exact rows.
        block: extents of a block of the codes along each axis.
        dtype: the logical dtype.
        channel_axis: the axis of the channels, counted from the end.
        axis: that of the tokens, from the start.
        places: where exact pages are held.
    """
    codes = empty(shape, quantizer, block, dtype, channel_axis)
    rows_shape, page_shape = list(shape), list(shape)
    rows_shape[axis] = places.num_pages * places.page_size
    page_shape[axis], page_shape[channel_axis] = places.num_pages, 1
    rows = empty(rows_shape, raw, [1] * len(shape), dtype)
    page = jnp.full(page_shape, NO_PAGE, jnp.int32)
    return PartlyExact(codes, rows, page, axis - len(shape), places.sinks)


@promoting_ranks
def overwrite_exact(array: PartlyExact, new: jax.Array) -> PartlyExact:
    """Return ``array`` with all replaced by ``new``, whose newest pages that are not zeros are held."""
    axis, places = array.tokens, array.places
    page_shape = list(array.page.shape)
    page_shape[axis] = places.length // places.page_size
    is_written = block_max(jnp.abs(new), page_shape) != 0
    numbers = lax.broadcasted_iota(jnp.int32, is_written.shape, axis)
    newest = jnp.where(is_written, numbers, NO_PAGE).max(axis, keepdims=True)
    held = array.like(array.codes, array.rows, places.newest(newest, axis))
    is_held = jnp.repeat(held.page != NO_PAGE, places.page_size, axis=axis)
    rows = jnp.where(is_held, held.at_rows(new), jnp.zeros((), new.dtype))
    codes = array.codes
    quantized = quantize_written(new, codes.quantizer, codes.block, codes.channel_axis)
    return held.like(codes.like(quantized.codes, quantized.parts), overwrite(array.rows, rows), held.page)
