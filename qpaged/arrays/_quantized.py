"""QuantizedArray: codes, the scales of their blocks, and the quantizer that reads them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from qpaged.arrays._blocks import (
    beside,
    block_max,
    block_min,
    block_shape,
    blocked,
    check_block,
    counts,
    spread,
)
from qpaged.arrays._folds import fold, folds_of, unfold, unfolded
from qpaged.arrays._packing import BYTE, pack, unpack
from qpaged.implicit import ImplicitArray, aux_field

if TYPE_CHECKING:
    from qpaged.quantizer import Quantizer

SMALLEST = float(np.finfo(np.float32).smallest_normal)
LARGE = 2.0**64  # a factor whose reciprocal is still far from the subnormal numbers


PARTS = ("codes", "scales", "outer", "offsets")


@dataclass(repr=False)
class QuantizedArray(ImplicitArray):
    """An array held as integer codes and one scale per block: x̂ = decode(codes) · scale (+ shift).

    Attributes:
        folded: the codes as they are stored: ``folds`` slots to a row.
        scales: what is stored per block, as many axes as ``codes``; None where a format has none.
        outer: second-level scales, one for all the scales along the channel axis; None for most formats.
        offsets: one float32 offset per block, in the shape of ``scales``, in views that lazy reads make;
            None where the stored scale says it all.
        quantizer: static; says how codes and scales are read and written.
        channel_axis: static; the axis of the channels (head_dim), counted from the end. It matters to
            formats that pack codes or turn channels, and stays -1 for the others. An axis that ``vmap`` adds
            must come before it.
        folds: static; 1 but for the pools of a cache, whose rows fill the lanes of a TPU. The channels are
            last there, and the slots before them, with nothing between that ``vmap`` adds.
        dtype: static; the logical floating-point dtype.

    The logical ``shape`` and the ``block`` shape follow from the children, so they stay right inside vmap,
    scan and shard_map. To programs under ``use_implicit_args`` it is an array of ``shape`` and ``dtype``.
    """

    folded: Any
    scales: Any
    offsets: Any = None
    outer: Any = None
    quantizer: "Quantizer" = aux_field(default=None)  # type: ignore[assignment]  # noqa: RUF009
    channel_axis: int = aux_field(default=-1)
    folds: int = aux_field(default=1)

    def __post_init__(self) -> None:
        """Nothing to infer: the shape is the codes', and the dtype is given."""

    @property  # type: ignore[misc]  # in place of a field, as the base class allows
    def shape(self) -> tuple[int, ...]:
        return logical_shape(unfolded(self.folded.shape, self.folds), self.packing, self.channel_axis)

    @shape.setter
    def shape(self, _: Any) -> None:
        """The inherited field is accepted and ignored: a stored shape would go stale under vmap."""

    @property
    def ndim(self) -> int:
        return len(self.folded.shape)

    @property
    def size(self) -> int:
        return int(np.prod(self.shape))

    @property
    def codes(self) -> Any:
        """Integers, in the logical shape; where they have fewer than 8 bits, several to a byte along the
        channel axis."""
        return unfold(self.folded, self.folds)

    @property
    def packing(self) -> int:
        """Codes in a byte."""
        return BYTE // self.quantizer.bits

    @property
    def block(self) -> tuple[int, ...]:
        """Extents of the box of elements that share one scale; ones where there are no scales."""
        if self.scales is None:
            return (1,) * self.ndim
        return block_shape(self.shape, self.scales.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and offsets."""
        return sum(leaf.nbytes for leaf in jax.tree_util.tree_leaves(self))

    def __repr__(self) -> str:
        parts = zip(PARTS, self._children(), strict=True)
        kept = ", ".join(f"{name}={part!r}" for name, part in parts if part is not None)
        return f"QuantizedArray({self.quantizer}, {jnp.dtype(self.dtype).name}, {kept})"

    def tree_flatten_with_keys(self):
        key = jax.tree_util.GetAttrKey
        children = [(key(name), part) for name, part in zip(PARTS, self._children(), strict=True)]
        return children, (self.quantizer, self.channel_axis, self.folds, self.dtype)

    def _children(self) -> tuple[Any, Any, Any, Any]:
        return self.folded, self.scales, self.outer, self.offsets

    @classmethod
    def tree_unflatten(cls, aux_data, children):
        self = cls.__new__(cls)
        self.folded, self.scales, self.outer, self.offsets = children
        self.quantizer, self.channel_axis, self.folds, self.dtype = aux_data
        return self

    def materialize(self) -> jax.Array:
        """The values in the logical dtype."""
        return self.dequantize(self.dtype)

    def dequantize(self, dtype: Any = jnp.float32) -> jax.Array:
        """The values as ``dtype``: computed in float32, rounded once, clipped to the finite numbers."""
        if self.scales is None or self.size == 0:
            return self.values(self.dtype).astype(dtype)
        values = blocked(self.values(jnp.float32), self.scales.shape)
        factors, shift = self.multipliers(), self.shift()
        if shift is None:
            x = values * beside(factors)
        else:  # brought down where the product may be too large for float32 and the sum is not
            down = jnp.where(jnp.abs(factors) > 1, jnp.float32(0.25), jnp.float32(1))
            x = (values * beside(factors * down) + beside(shift * down)) / beside(down)
        x = x.reshape(self.shape)
        if self.quantizer.transforms:
            x = self.quantizer.inverse(x, self.channel_axis)
        largest = jnp.float32(jnp.finfo(dtype).max)
        # What was never finite stays as it is, as does the NaN of a read past the end.
        known = jnp.isfinite(values).reshape(self.shape)
        return jnp.where(known, jnp.clip(x, -largest, largest), x).astype(dtype)

    @property
    def parts(self) -> tuple[Any, Any, Any]:
        """The children beside the codes, as :meth:`like` takes them."""
        return self.scales, self.offsets, self.outer

    def values(self, dtype: Any) -> jax.Array:
        """The codes as numbers in units of their scale; exact in ``dtype`` for codes of 8 bits and fewer."""
        made_for = self.dtype if self.scales is None else dtype
        return self.quantizer.decode(self.unpacked(), made_for).astype(dtype)

    def unpacked(self) -> jax.Array:
        """The codes, one an element, in the logical shape."""
        quantizer = self.quantizer
        return unpack(self.codes, quantizer.bits, self.channel_axis, quantizer.code_dtype(self.dtype))

    def multipliers(self) -> jax.Array:
        """The scales as float32 factors, in the shape of ``scales``."""
        return multipliers(self.quantizer, self.scales, self.outer)

    def shift(self) -> jax.Array | None:
        """What is added to each block, float32 in the shape of ``scales``; None where nothing is."""
        return self.quantizer.shift(self.scales) if self.offsets is None else self.offsets

    def like(
        self, codes: Any, scales: Any, offsets: Any = None, outer: Any = None, **changes: Any
    ) -> "QuantizedArray":
        """The same format around other children, stored as this is where ``codes`` have the same shape."""
        same = tuple(codes.shape) == unfolded(self.folded.shape, self.folds)
        made = {name: getattr(self, name) for name in ("quantizer", "channel_axis", "dtype")}
        made |= {"folds": self.folds if same else 1} | changes
        return QuantizedArray(fold(codes, made["folds"]), scales, offsets, outer, **made)


def logical_shape(shape: Sequence[int], packing: int, channel_axis: int) -> tuple[int, ...]:
    """The shape of an array whose codes have ``shape``."""
    logical = list(shape)
    if packing > 1:
        logical[channel_axis] *= packing
    return tuple(logical)


def quantize(
    array: Any, quantizer: "Quantizer", block: Sequence[int], dtype: Any = None, channel_axis: int = -1
) -> QuantizedArray:
    """The whole of ``array`` in ``quantizer``'s format, one scale for every ``block``.

    Args:
        array: floats of any shape.
        quantizer: the format.
        block: extents of a block along each axis; they divide the shape.
        dtype: the logical dtype; the array's own if None.
        channel_axis: the axis of the channels (head_dim), counted from the end.

    Raises:
        TypeError: the array is not of a real floating-point dtype.
        ValueError: the block does not divide the shape, or whole bytes of codes do not.
    """
    array = jnp.asarray(array)
    dtype = float_dtype("array", array.dtype if dtype is None else dtype)
    check_block(array.shape, block)
    check_packing(array.shape, quantizer, channel_axis)
    made = {"quantizer": quantizer, "dtype": dtype}
    if quantizer.bits < BYTE or quantizer.transforms:
        made["channel_axis"] = channel_axis
    if quantizer.scale_dtype is None:
        return QuantizedArray(quantizer.encode(array.astype(dtype)), None, **made)
    x = prepared(array, quantizer, dtype, channel_axis)
    grid = counts(array.shape, block)
    low, high = extremes(x, grid)
    scales, outer = fit(quantizer, low, high, outer_grid(quantizer, grid, channel_axis))
    codes = pack(encode(x, quantizer, scales, outer), quantizer.bits, channel_axis)
    return QuantizedArray(codes, scales, None, outer, **made)


def empty(
    shape: Sequence[int], quantizer: "Quantizer", block: Sequence[int], dtype: Any, channel_axis: int = -1
) -> QuantizedArray:
    """An array in which nothing was written yet: all its parts are zeros, and so are its values."""
    zeros = jax.eval_shape(lambda: quantize(jnp.zeros(shape, dtype), quantizer, block, dtype, channel_axis))
    return jax.tree_util.tree_map(lambda part: jnp.zeros(part.shape, part.dtype), zeros)


def fill_rows(array: QuantizedArray) -> QuantizedArray:
    """``array`` (..., slots, channels) stored with as many slots to a row as fill a TPU's lanes."""
    codes = array.codes
    folds = folds_of(codes.shape) if array.channel_axis == -1 else 1
    return array.like(codes, *array.parts, folds=folds)


def check_packing(shape: Sequence[int], quantizer: "Quantizer", channel_axis: int) -> None:
    """ValueError unless codes along the channel axis fill whole bytes."""
    several = BYTE // quantizer.bits
    if several > 1 and shape[channel_axis] % several:
        raise ValueError(
            f"array must have a multiple of {several} channels, of which {quantizer} packs {several} to a "
            f"byte, but came with shape {tuple(shape)}; take a format of 8 bits."
        )


def check_parts(codes: Any, scales: Any, outer: Any, quantizer: "Quantizer", dtype: Any) -> None:
    """ValueError unless these are the parts of one array of this format, channels last."""
    several = BYTE // quantizer.bits
    right = codes.ndim > 0 and codes.dtype == (jnp.uint8 if several > 1 else quantizer.code_dtype(dtype))
    shape = logical_shape(codes.shape, several, -1) if right else ()
    for part, part_dtype in ((scales, quantizer.scale_dtype), (outer, quantizer.outer_dtype)):
        right = right and (part is None) == (part_dtype is None)
        if part is not None and right:
            right = part.ndim == codes.ndim and part.dtype == part_dtype
            right = right and all(
                n > 0 and length % n == 0 for length, n in zip(shape, part.shape, strict=True)
            )
    if not right:
        shapes = [None if p is None else f"{p.dtype.name}{p.shape}" for p in (codes, scales, outer)]
        raise ValueError(
            f"codes, scales and outer must be of one {quantizer} array, but came as {shapes}; "
            f"the data was not written whole."
        )


def extremes(x: jax.Array, grid: Sequence[int]) -> tuple[jax.Array, jax.Array]:
    """The least and the greatest value of each block."""
    return block_min(x, grid), block_max(x, grid)


def outer_grid(quantizer: "Quantizer", grid: Sequence[int], channel_axis: int) -> tuple[int, ...] | None:
    """The shape of second-level scales over scales of shape ``grid``; None where there are none."""
    if quantizer.outer_dtype is None:
        return None
    channels = channel_axis % len(grid)
    return tuple(1 if axis == channels else n for axis, n in enumerate(grid))


def fit(
    quantizer: "Quantizer", low: jax.Array, high: jax.Array, outer_shape: Sequence[int] | None
) -> tuple[jax.Array, jax.Array | None]:
    """Stored scales, and second-level ones, of blocks with these extremes."""
    if outer_shape is None:
        return quantizer.fit(low, high), None
    outer = quantizer.outer_scale(block_max(jnp.maximum(-low, high), outer_shape))
    factor = nonzero(spread(quantizer.outer_multiplier(outer), low.shape))
    return quantizer.fit(low / factor, high / factor), outer


def multipliers(quantizer: "Quantizer", scales: jax.Array, outer: jax.Array | None) -> jax.Array:
    """Stored scales as float32 factors, second level included."""
    factors = quantizer.multiplier(scales)
    return factors if outer is None else factors * spread(quantizer.outer_multiplier(outer), scales.shape)


def encode(
    x: jax.Array, quantizer: "Quantizer", scales: jax.Array, outer: jax.Array | None = None
) -> jax.Array:
    """Codes, one an element, of float32 ``x`` under the stored ``scales`` of its blocks."""
    pieces = blocked(x, scales.shape)
    if outer is not None:
        pieces = pieces / beside(nonzero(spread(quantizer.outer_multiplier(outer), scales.shape)))
    return quantizer.encode_under(pieces, beside(scales)).reshape(x.shape)


def nonzero(factor: jax.Array) -> jax.Array:
    """``factor``, with 1 where it is 0."""
    return jnp.where(factor != 0, factor, 1)


def in_units(x: jax.Array, factor: jax.Array) -> jax.Array:
    """float32 ``x`` in units of ``factor`` (broadcast), as it is where that is 0.

    A product with the reciprocal, which XLA makes of some quotients and not of others: codes must not hang on
    the program around them. Where the reciprocal would not be a normal number, both are brought down first.
    """
    down = jnp.where(jnp.abs(factor) >= LARGE, jnp.float32(1 / LARGE), jnp.float32(1))
    return (x * down) * (1 / (nonzero(factor) * down))


def prepared(x: jax.Array, quantizer: "Quantizer", dtype: Any, channel_axis: int) -> jax.Array:
    """Finite float32 values, as the format's blocks hold them."""
    x = finite(x, dtype)
    return flushed(quantizer.transform(x, channel_axis)) if quantizer.transforms else x


def finite(x: jax.Array, dtype: Any) -> jax.Array:
    """``x`` as float32 with NaN as 0, infinities as the largest finite ``dtype``, subnormals as 0."""
    x = x.astype(jnp.float32)
    largest = np.float32(min(float(jnp.finfo(dtype).max), float(jnp.finfo(jnp.float32).max)))
    return flushed(jnp.clip(jnp.where(jnp.isnan(x), 0, x), -largest, largest))


def flushed(x: jax.Array) -> jax.Array:
    """``x`` with float32 subnormals as 0.

    Whether a backend flushes them is its own affair; counting them as zero everywhere is what keeps codes the
    same on all of them.
    """
    return jnp.where(jnp.abs(x) < SMALLEST, 0, x)


def float_dtype(name: str, dtype: Any) -> np.dtype:
    """``dtype`` as a NumPy dtype; TypeError unless it is a real floating-point one that JAX has enabled."""
    if dtype is None:
        raise TypeError(
            f"{name} must be a real floating-point dtype, but came as None; give jnp.bfloat16, say."
        )
    dtype = jnp.dtype(dtype)
    if jax.dtypes.canonicalize_dtype(dtype) != dtype:
        raise TypeError(
            f"{name} came as float64, which JAX has not enabled; use float32, or set jax_enable_x64."
        )
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(
            f"{name} must have a real floating-point dtype, but came as {dtype.name}; "
            f"convert it first, for example with .astype(jnp.bfloat16)."
        )
    return dtype


def common_dtype(one: Any, other: Any) -> np.dtype:
    """The dtype two floats meet in, also under strict promotion: their own, or float32 or wider."""
    one, other = jnp.dtype(one), jnp.dtype(other)
    return one if one == other else max(jnp.dtype(jnp.float32), one, other, key=lambda dtype: dtype.itemsize)
