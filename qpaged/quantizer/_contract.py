"""The contract of a format: a small frozen, hashable object whose methods are pure JAX."""

import abc
import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from qpaged.arrays import QuantizedArray, empty, in_units, quantize
from qpaged.quantizer._granularity import check_granularity, page_block


def _check_scale_dtype(name: str, dtype: Any) -> None:
    if dtype is not None and jnp.issubdtype(dtype, jnp.floating) and jnp.dtype(dtype).itemsize < 4:
        raise TypeError(
            f"scale_dtype must be float32 or an integer dtype, but is {jnp.dtype(dtype).name} for {name}, "
            f"and XLA on CPU copies a whole array of narrow floats at each write; store the bits of it in "
            f"an integer of its width, and read them in multiplier()."
        )


@functools.lru_cache
def _code_dtype(quantizer: "Quantizer") -> Any:
    return jax.eval_shape(quantizer.encode, jax.ShapeDtypeStruct((), jnp.float32)).dtype


@dataclasses.dataclass(frozen=True)
class Quantizer(abc.ABC):
    """A format: how values become codes and scales, and back.

    A subclass gives a scale rule, :meth:`encode` and :meth:`decode`; blocks, packing, scatter, growth, lazy
    reads, sizing, files and sweeps come from the framework. Both directions work in *units of the scale*, so
    a format never multiplies by its scale, and attention can fold it away.

    Attributes:
        granularity: which elements of a page share a scale: ``page`` (all), ``token`` (one slot's),
            ``channel`` (one channel's, over the page's slots), ``group32`` (32 neighbouring channels of one
            slot; any number goes) or ``element`` (none do). Empty for the format's default.
    """

    granularity: str = ""

    name: ClassVar[str]
    """The spelling's first part; the name of the entry point."""
    granularities: ClassVar[tuple[str, ...]] = ("token", "group32", "group64", "group128")
    """What ``granularity`` may be; the first is the default. Where tokens share a scale (``page``,
    ``channel``) it grows as they arrive: see :meth:`grow`."""
    bits: ClassVar[int] = 8
    """Bits of a code: 8, or 4 or 2, which are packed into bytes."""
    scale_dtype: ClassVar[Any] = jnp.float32
    """Dtype of a stored scale, float32 or an integer one; None for a format without scales. A scale should be
    a normal float32 number, and one that a code's least value times is one, too."""
    outer_dtype: ClassVar[Any] = None
    """Dtype of a stored second-level scale; None for a format without."""
    bound: ClassVar[float]
    """Largest error |x - x̂|, in units of the block's scale."""
    levels: ClassVar[tuple[float, float] | None] = None
    """The lowest and the highest value of a code in units of the scale, where codes are evenly spaced in
    between: what wrappers that shift blocks need to know. None otherwise."""
    shareable: ClassVar[bool] = True
    """False for a format whose scales cannot grow, so that every write must cover its blocks."""
    transforms: ClassVar[bool] = False
    """Whether blocks hold :meth:`transform` of the values instead of these."""
    writable: ClassVar[bool] = True
    """False for views of a format that lazy reads make, which can only be read."""
    tiled: ClassVar[bool] = True
    """Whether kernels may call this format's methods on the tiles they hold, as far as they find them to be
    elementwise; False keeps them away."""
    past_end: ClassVar[Any] = math.nan
    """The stored scale that reads as NaN; None if no value does."""

    def __post_init__(self) -> None:
        if not self.granularity:
            object.__setattr__(self, "granularity", self.granularities[0])
        check_granularity(self.name, self.granularity, self.granularities)
        _check_scale_dtype(self.name, self.scale_dtype)

    @abc.abstractmethod
    def scale(self, absmax: jax.Array) -> jax.Array:
        """The scale rule: the stored scale of a block from its largest magnitude (float32).

        It must not fall as ``absmax`` rises, and is 0 exactly where ``absmax`` is.
        """

    @abc.abstractmethod
    def encode(self, units: jax.Array) -> jax.Array:
        """Codes, one an element, of float32 values in units of their scale."""

    @abc.abstractmethod
    def decode(self, codes: jax.Array, dtype: Any) -> jax.Array:
        """Values of codes, in units of their scale, as ``dtype``; elementwise.

        They must be exact in bfloat16, since attention contracts at the precision of its query. Code 0 is
        asked for, too, whatever it means.
        """

    @property
    def order_bound(self) -> float:
        """Largest difference, in units of the scale, between two orders of writing; 0 is bit for bit."""
        return 0.0

    def code_dtype(self, dtype: Any) -> Any:
        """The integer dtype of codes, one an element, in an array of logical ``dtype``: encode's own."""
        return _code_dtype(self)

    def multiplier(self, scales: jax.Array) -> jax.Array:
        """Stored scales as float32 factors."""
        return scales.astype(jnp.float32)

    def shift(self, scales: jax.Array) -> jax.Array | None:
        """The float32 offsets that stored scales carry, added to what is read; None for a format without."""
        return None

    def fit(self, low: jax.Array, high: jax.Array) -> jax.Array:
        """The stored scale of a block from its least and greatest value (float32)."""
        return self.scale(jnp.maximum(-low, high))

    def encode_under(self, x: jax.Array, scales: jax.Array) -> jax.Array:
        """Codes of float32 ``x`` under stored ``scales`` (broadcast); a zero scale encodes zeros."""
        shift = self.shift(scales)
        return self.encode(self.in_units(x if shift is None else x - shift, scales))

    def in_units(self, x: jax.Array, scales: jax.Array) -> jax.Array:
        """float32 ``x`` in units of stored ``scales`` (broadcast): the same bits in every program."""
        return in_units(x, self.multiplier(scales))

    def holds(self, scales: jax.Array, low: jax.Array, high: jax.Array) -> jax.Array:
        """Whether blocks with these stored ``scales`` take these extremes without growing."""
        needed = self.multiplier(self.fit(low, high))
        return jnp.abs(needed) <= jnp.abs(self.multiplier(scales))

    def refit(self, scales: jax.Array, codes: jax.Array, low: jax.Array, high: jax.Array) -> jax.Array:
        """The stored scales of blocks that do not hold new extremes.

        Args:
            scales: what was stored.
            codes: the greatest code of each block.
            low: the least of what is written now.
            high: the greatest of it.
        """
        return self.fit(low, high)

    def grow(self, codes: jax.Array, old: jax.Array, new: jax.Array) -> jax.Array:
        """Codes under ``old`` stored scales re-expressed under larger ``new`` ones (broadcast)."""
        ratio = self.multiplier(old) / self.multiplier(new)
        return self.encode(self.decode(codes, jnp.float32) * ratio)

    def outer_scale(self, absmax: jax.Array) -> jax.Array:
        """The stored second-level scale, for the largest magnitude in all its blocks (float32)."""
        raise NotImplementedError(f"{self.name} has no second-level scales; outer_dtype says so.")

    def outer_multiplier(self, outer: jax.Array) -> jax.Array:
        """Stored second-level scales as float32 factors; powers of two."""
        raise NotImplementedError(f"{self.name} has no second-level scales; outer_dtype says so.")

    def transform(self, x: jax.Array, axis: int) -> jax.Array:
        """The float32 values that blocks hold: a linear map along the channels, which are on ``axis``."""
        return x

    def inverse(self, x: jax.Array, axis: int) -> jax.Array:
        """The inverse of :meth:`transform`, and linear too."""
        return x

    def error_bound(self, x: jax.Array, multipliers: jax.Array) -> jax.Array:
        """The largest |x - x̂| for each element of ``x`` (..., channels), given its block's factor."""
        return jnp.broadcast_to(self.bound * jnp.abs(multipliers), x.shape)

    def block(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The block on an array (..., slots, head_dim), as a pool (kv_heads, pages, page_size, head_dim).

        Raises:
            ValueError: the array has no such axes, or the group does not divide head_dim.
        """
        return page_block(self, shape)

    def quantize(self, array: Any, dtype: Any = None) -> QuantizedArray:
        """The whole of ``array`` (..., slots, head_dim); its last two axes are one page.

        Args:
            array: floats; NaN is stored as 0 and infinities as the largest finite number.
            dtype: the logical dtype; the array's own if None.

        Raises:
            TypeError: the array is not of a real floating-point dtype.
            ValueError: the group does not divide head_dim, or codes do not fill whole bytes.
        """
        array = jnp.asarray(array)
        return quantize(array, self, self.block(array.shape), dtype)

    def empty(self, shape: Sequence[int], dtype: Any) -> QuantizedArray:
        """An array (..., slots, head_dim) in which nothing was written: it reads as zeros.

        Args:
            shape: of the array.
            dtype: the logical dtype.
        """
        return empty(shape, self, self.block(shape), dtype)

    @property
    def config(self) -> dict[str, Any]:
        """Everything that makes this quantizer, as plain JSON."""
        return {"name": self.name, **dataclasses.asdict(self)}

    def __str__(self) -> str:
        """The spelling that makes this quantizer."""
        default = self.granularity == self.granularities[0]
        return self.name if default else f"{self.name}:{self.granularity}"
