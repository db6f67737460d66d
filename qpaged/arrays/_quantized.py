"""QuantizedArray: codes, the scales of their blocks, and the quantizer that reads them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from qpaged.arrays._blocks import beside, block_max, block_shape, blocked, check_block, counts
from qpaged.implicit import ImplicitArray, aux_field

if TYPE_CHECKING:
    from qpaged.quantizer import Quantizer

SMALLEST = float(np.finfo(np.float32).smallest_normal)


@dataclass(repr=False)
class QuantizedArray(ImplicitArray):
    """An array held as integer codes and one scale per block: x̂ = decode(codes) · scale (+ offset).

    Attributes:
        codes: integers, in the logical shape.
        scales: one stored scale per block, as many axes as ``codes``; None where a format has none.
        offsets: one float32 offset per block, in the shape of ``scales``, or None.
        quantizer: static; says how codes and scales are read and written.
        dtype: static; the logical floating-point dtype.

    The logical ``shape`` and the ``block`` shape follow from the children, so they stay right inside vmap,
    scan and shard_map. To programs under ``use_implicit_args`` it is an array of ``shape`` and ``dtype``.
    """

    codes: Any
    scales: Any
    offsets: Any = None
    quantizer: "Quantizer" = aux_field(default=None)  # type: ignore[assignment]  # noqa: RUF009

    def __post_init__(self) -> None:
        """Nothing to infer: the shape is the codes', and the dtype is given."""

    @property  # type: ignore[misc]  # in place of a field, as the base class allows
    def shape(self) -> tuple[int, ...]:
        return tuple(self.codes.shape)

    @shape.setter
    def shape(self, _: Any) -> None:
        """The inherited field is accepted and ignored: a stored shape would go stale under vmap."""

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return int(np.prod(self.shape))

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
        parts = {name: getattr(self, name) for name in ("codes", "scales", "offsets")}
        kept = ", ".join(f"{name}={part!r}" for name, part in parts.items() if part is not None)
        return f"QuantizedArray({self.quantizer}, {jnp.dtype(self.dtype).name}, {kept})"

    def tree_flatten_with_keys(self):
        key = jax.tree_util.GetAttrKey
        children = [(key(name), getattr(self, name)) for name in ("codes", "scales", "offsets")]
        return children, (self.quantizer, self.dtype)

    @classmethod
    def tree_unflatten(cls, aux_data, children):
        self = cls.__new__(cls)
        self.codes, self.scales, self.offsets = children
        self.quantizer, self.dtype = aux_data
        return self

    def materialize(self) -> jax.Array:
        """The values in the logical dtype."""
        return self.dequantize(self.dtype)

    def dequantize(self, dtype: Any = jnp.float32) -> jax.Array:
        """The values as ``dtype``: computed in float32, rounded once, clipped to the finite numbers."""
        if self.scales is None or self.size == 0:
            return self.values(self.dtype).astype(dtype)
        values = blocked(self.values(jnp.float32), self.scales.shape)
        x = values * beside(self.multipliers())
        if self.offsets is not None:
            x = x + beside(self.offsets)
        largest = jnp.float32(jnp.finfo(dtype).max)
        # What was never finite stays as it is, as does the NaN of a read past the end.
        x = jnp.where(jnp.isfinite(values), jnp.clip(x, -largest, largest), x)
        return x.reshape(self.shape).astype(dtype)

    def values(self, dtype: Any) -> jax.Array:
        """The codes as numbers in units of their scale; exact in ``dtype`` for codes of 8 bits and fewer."""
        made_for = self.dtype if self.scales is None else dtype
        return self.quantizer.decode(self.codes, made_for).astype(dtype)

    def multipliers(self) -> jax.Array:
        """The scales as float32 factors, in the shape of ``scales``."""
        return self.quantizer.multiplier(self.scales)

    def like(self, codes: Any, scales: Any, offsets: Any = None, **changes: Any) -> "QuantizedArray":
        """The same format around other children."""
        made = {"quantizer": self.quantizer, "dtype": self.dtype} | changes
        return QuantizedArray(codes, scales, offsets, **made)


def quantize(array: Any, quantizer: "Quantizer", block: Sequence[int], dtype: Any = None) -> QuantizedArray:
    """The whole of ``array`` in ``quantizer``'s format, one scale for every ``block``.

    Args:
        array: floats of any shape.
        quantizer: the format.
        block: extents of a block along each axis; they divide the shape.
        dtype: the logical dtype; the array's own if None.

    Raises:
        TypeError: the array is not of a real floating-point dtype.
        ValueError: the block does not divide the shape.
    """
    array = jnp.asarray(array)
    dtype = float_dtype("array", array.dtype if dtype is None else dtype)
    check_block(array.shape, block)
    if quantizer.scale_dtype is None:
        return QuantizedArray(quantizer.encode(array.astype(dtype)), None, quantizer=quantizer, dtype=dtype)
    x = finite(array, dtype)
    scales = quantizer.scale(block_max(jnp.abs(x), counts(array.shape, block)))
    codes = encode(x, scales, quantizer)
    return QuantizedArray(codes, scales, quantizer=quantizer, dtype=dtype)


def check_parts(codes: Any, scales: Any, offsets: Any, quantizer: "Quantizer", dtype: Any) -> None:
    """ValueError unless these are the parts of one array of this format."""
    right = codes.dtype == quantizer.code_dtype(dtype) and (scales is None) == (quantizer.scale_dtype is None)
    for part in (scales, offsets):
        if part is not None and right:
            right = part.ndim == codes.ndim and all(
                n > 0 and length % n == 0 for length, n in zip(codes.shape, part.shape, strict=True)
            )
    if not right or (scales is not None and scales.dtype != quantizer.scale_dtype):
        shapes = [
            None if part is None else f"{part.dtype.name}{part.shape}" for part in (codes, scales, offsets)
        ]
        raise ValueError(
            f"codes, scales and offsets must be of one {quantizer} array, but came as {shapes}; "
            f"the data was not written whole."
        )


def encode(x: jax.Array, scales: jax.Array, quantizer: "Quantizer") -> jax.Array:
    """Codes of finite float32 ``x`` under the stored ``scales`` of its blocks; a zero scale encodes zeros."""
    multiplier = quantizer.multiplier(scales)
    units = blocked(x, scales.shape) / beside(jnp.where(multiplier > 0, multiplier, 1))
    return quantizer.encode(units).reshape(x.shape)


def finite(x: jax.Array, dtype: Any) -> jax.Array:
    """``x`` as float32 with NaN as 0, infinities as the largest finite ``dtype``, subnormals as 0.

    Whether a backend flushes float32 subnormals is its own affair; counting them as zero everywhere is what
    keeps codes the same on all of them.
    """
    x = x.astype(jnp.float32)
    largest = np.float32(min(float(jnp.finfo(dtype).max), float(jnp.finfo(jnp.float32).max)))
    x = jnp.clip(jnp.where(jnp.isnan(x), 0, x), -largest, largest)
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
