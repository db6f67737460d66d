"""The protocol that arrays ask of a format; a quantizer keeps it whole, a read-only format in part.

A format has five optional abilities. Each is an attribute that is None or an object, so that code asks
``format.transform is None`` and never what class a format is of.
"""

from typing import Any, Protocol

import jax
from jax.typing import DTypeLike


class GrowthRule(Protocol):
    """How scales that several tokens share grow as larger values arrive."""

    def covers(self, scales: jax.Array, low: jax.Array, high: jax.Array) -> jax.Array:
        """Return True where blocks take the extremes ``low`` and ``high`` under the scales they have."""

    def grown_scale(
        self, scales: jax.Array, greatest_code: jax.Array, low: jax.Array, high: jax.Array
    ) -> jax.Array:
        """Return the stored scales of blocks that do not cover new extremes."""

    def requantize(self, codes: jax.Array, old: jax.Array, new: jax.Array) -> jax.Array:
        """Return ``codes`` under ``old`` stored scales as codes under larger ``new`` ones (broadcast)."""


class BlockFitRule(Protocol):
    """How scales follow from all values of their blocks, where extremes do not tell enough."""

    def scale(self, x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
        """Return the stored scales of blocks, whose float32 values are along ``axes`` of ``x``.

        They have the other axes, and are 0 exactly where all values of a block are. Nothing may depend on the
        order of a sum: see law 2.
        """


class OffsetRule(Protocol):
    """How stored scales carry an offset that is added to their block."""

    def from_scales(self, scales: jax.Array) -> jax.Array:
        """Return the float32 offsets of stored ``scales``."""


class GlobalScaleRule(Protocol):
    """A second level of scales: one for all the blocks of a token's head."""

    dtype: DTypeLike

    def scale(self, absmax: jax.Array) -> jax.Array:
        """Return the stored second-level scale for the largest magnitude in all its blocks (float32)."""

    def multiplier(self, stored: jax.Array) -> jax.Array:
        """Return stored second-level scales as float32 factors, which are powers of two."""


class TransformRule(Protocol):
    """A linear map along the channels, which blocks hold the values under."""

    def forward(self, x: jax.Array, axis: int) -> jax.Array:
        """Return the float32 values that blocks hold, for values ``x`` whose channels are on ``axis``."""

    def inverse(self, x: jax.Array, axis: int) -> jax.Array:
        """Return the values again; linear, too."""


class ArrayFormat(Protocol):
    """What a :class:`QuantizedArray` asks of its format. Instances compare by value."""

    def __hash__(self) -> int: ...

    @property
    def bits(self) -> int:
        """Bits of a code: 8, or 4 or 2, which are packed into bytes."""

    @property
    def state_bits(self) -> int | None:
        """Bits of what ``decode`` reads in place of a code, of a trellis; None where it reads codes."""

    @property
    def scale_dtype(self) -> DTypeLike | None:
        """The dtype of stored scales; None for a format without."""

    @property
    def nan_scale(self) -> float | int | None:
        """The stored scale that reads as NaN; None if there is none."""

    @property
    def elementwise(self) -> bool:
        """Whether kernels may call the format's methods on their tiles."""

    @property
    def writable(self) -> bool:
        """Whether arrays of this format can be written to."""

    @property
    def has_static_scales(self) -> bool:
        """Whether scales are given, and stay as they are whatever is written."""

    @property
    def growth(self) -> GrowthRule | None:
        """How shared scales grow; None if they cannot, so that every write must cover its blocks."""

    @property
    def block_fit(self) -> BlockFitRule | None:
        """How scales follow from whole blocks; None if they follow from extremes."""

    @property
    def offset(self) -> OffsetRule | None:
        """How scales carry an offset; None if they carry none."""

    @property
    def global_scale(self) -> GlobalScaleRule | None:
        """The second level of scales; None if there is none."""

    @property
    def transform(self) -> TransformRule | None:
        """What blocks hold instead of the values themselves; None if they hold these."""

    def code_dtype(self, dtype: DTypeLike) -> Any:
        """Return the integer dtype of codes, one an element, in an array of logical ``dtype``."""

    def fit(self, low: jax.Array, high: jax.Array) -> jax.Array:
        """Return the stored scale of a block from its least and greatest value (float32)."""

    def encode(self, units: jax.Array) -> jax.Array:
        """Return the codes of values in units of their scale; of the values themselves without scales."""

    def to_units(self, x: jax.Array, scales: jax.Array) -> jax.Array:
        """Return float32 ``x`` less its offset, in units of stored ``scales`` (broadcast)."""

    def encode_under(self, x: jax.Array, scales: jax.Array) -> jax.Array:
        """Return the codes of float32 ``x`` under stored ``scales`` (broadcast)."""

    def decode(self, codes: jax.Array, dtype: DTypeLike) -> jax.Array:
        """Return what codes stand for, in units of their scale, as ``dtype``."""

    def multiplier(self, scales: jax.Array) -> jax.Array:
        """Return stored scales as float32 factors."""
