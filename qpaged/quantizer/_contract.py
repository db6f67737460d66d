"""The contract of a format: a small frozen, hashable object whose methods are pure JAX."""

import abc
import dataclasses
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from qpaged.arrays import QuantizedArray, quantize

GRANULARITIES = ("page", "token", "channel")


@dataclasses.dataclass(frozen=True)
class Quantizer(abc.ABC):
    """A format: how values become codes and scales, and back.

    A subclass gives a scale rule, :meth:`encode` and :meth:`decode`; blocks, scatter, growth, lazy reads,
    sizing, files and sweeps come from the framework. Both directions work in *units of the scale*, so a
    format never multiplies by its scale, and attention can fold it away.

    Attributes:
        granularity: which elements of a page share a scale: ``page`` (all), ``token`` (one slot's) or
            ``channel`` (one channel's, over the page's slots).
    """

    granularity: str = "page"

    name: ClassVar[str]
    """The spelling's first part; the name of the entry point."""
    granularities: ClassVar[tuple[str, ...]] = GRANULARITIES
    """What ``granularity`` may be; the first is the default."""
    scale_dtype: ClassVar[Any] = jnp.float32
    """Dtype of a stored scale; None for a format without scales."""
    bound: ClassVar[float]
    """Largest error |x - x̂|, in units of the block's scale."""
    writable: ClassVar[bool] = True
    """False for views of a format that lazy reads make, which can only be read."""

    past_end: ClassVar[Any] = math.nan
    """The stored scale that reads as NaN; None if no value does."""

    def __post_init__(self) -> None:
        if self.granularity not in self.granularities:
            raise ValueError(
                f"granularity must be one of {', '.join(self.granularities)} for {self.name}, "
                f"but came as {self.granularity!r}."
            )

    @abc.abstractmethod
    def scale(self, absmax: jax.Array) -> jax.Array:
        """The scale rule: the stored scale of a block from its largest magnitude (float32).

        It must not fall as ``absmax`` rises, and is 0 exactly where ``absmax`` is.
        """

    @abc.abstractmethod
    def encode(self, units: jax.Array) -> jax.Array:
        """Codes of float32 values in units of their scale."""

    @abc.abstractmethod
    def decode(self, codes: jax.Array, dtype: Any) -> jax.Array:
        """Values of codes, in units of their scale, exactly, as ``dtype``."""

    @property
    def order_bound(self) -> float:
        """Largest difference, in units of the scale, between two orders of writing; 0 is bit for bit."""
        return 0.0

    def code_dtype(self, dtype: Any) -> Any:
        """The integer dtype that stores the codes of an array of logical ``dtype``."""
        return jnp.int8

    def multiplier(self, scales: jax.Array) -> jax.Array:
        """Stored scales as float32 factors."""
        return scales.astype(jnp.float32)

    def grow(self, codes: jax.Array, old: jax.Array, new: jax.Array) -> jax.Array:
        """Codes under ``old`` stored scales re-expressed under larger ``new`` ones (broadcast)."""
        ratio = self.multiplier(old) / self.multiplier(new)
        return self.encode(self.decode(codes, jnp.float32) * ratio)

    def error_bound(self, x: jax.Array, multipliers: jax.Array) -> jax.Array:
        """The largest |x - x̂| for each element of ``x``, given its block's factor (broadcast)."""
        return jnp.broadcast_to(self.bound * multipliers, x.shape)

    def block(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The block on an array (..., slots, head_dim), as a pool (kv_heads, pages, page_size, head_dim)."""
        if len(shape) < 2:
            raise ValueError(
                f"array must have at least two axes, (..., slots, head_dim), but came with shape "
                f"{tuple(shape)}; give the block yourself with qpaged.arrays.quantize."
            )
        slots, head_dim = (max(1, length) for length in shape[-2:])
        last = {"page": (slots, head_dim), "token": (1, head_dim), "channel": (slots, 1)}
        return (1,) * (len(shape) - 2) + last[self.granularity]

    def quantize(self, array: Any, dtype: Any = None) -> QuantizedArray:
        """The whole of ``array`` (..., slots, head_dim); its last two axes are one page.

        Args:
            array: floats; NaN is stored as 0 and infinities as the largest finite number.
            dtype: the logical dtype; the array's own if None.

        Raises:
            TypeError: the array is not of a real floating-point dtype.
        """
        array = jnp.asarray(array)
        return quantize(array, self, self.block(array.shape), dtype)

    @property
    def config(self) -> dict[str, Any]:
        """Everything that makes this quantizer, as plain JSON."""
        return {"name": self.name, **dataclasses.asdict(self)}

    def __str__(self) -> str:
        """The spelling that makes this quantizer."""
        default = self.granularity == self.granularities[0]
        return self.name if default else f"{self.name}:{self.granularity}"
