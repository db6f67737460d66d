"""The contract of a format: a small frozen, hashable object whose methods are pure JAX."""

import abc
import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from qpaged.arrays import (
    BlockFitRule,
    GlobalScaleRule,
    GrowthRule,
    OffsetRule,
    QuantizedArray,
    TransformRule,
    empty,
    in_units,
    quantize,
)
from qpaged.formats._checks import TILE, check_attributes, check_class, check_methods
from qpaged.formats._granularity import SHARED, STATIC, check_granularity, page_block
from qpaged.formats._growth import FitAgain


@dataclasses.dataclass(frozen=True)
class Quantizer(abc.ABC):
    """A format: how values become codes and scales, and back.

    A subclass gives ``name``, ``bound``, :meth:`scale`, :meth:`encode` and :meth:`decode`; blocks, packing,
    scatter, growth, lazy reads, sizing, files and sweeps come from the framework. Both directions work in
    *units of the scale*: a format never multiplies by its scale, so that attention can multiply by it once
    per block.

    What few formats have is an attribute that is None or an object: :attr:`growth`, :attr:`offset`,
    :attr:`global_scale`, :attr:`transform`, :attr:`block_fit`.

    Attributes:
        granularity: which elements share a scale: ``page`` (a page of one KV head), ``token`` (its one slot),
            ``channel`` (its one channel, over the page's slots), ``group32`` (32 neighbouring channels of one
            slot; other sizes where :attr:`granularities` lists them), ``element`` (no two), ``head`` (all
            pages of one KV head) or ``tensor`` (a whole pool); the last two are :attr:`static
            <has_static_scales>`. Empty for the format's default.

    Raises:
        TypeError: When a class is defined: it has ``bits`` that nothing packs, or a method under its old
            name. When an instance is made: its class lacks ``name`` or ``bound``, its ``encode`` returns
            floats, or its scales are narrow floats.
        ValueError: a granularity that the format does not offer.
    """

    granularity: str = ""

    name: ClassVar[str]
    """The name in spellings such as ``int8:token``, and of the entry point."""
    granularities: ClassVar[tuple[str, ...]] = ("token", "group32", "group64", "group128")
    """What ``granularity`` may be; the first is the default. A scale that tokens share (``page``,
    ``channel``) grows as tokens arrive: see :attr:`growth`."""
    bits: ClassVar[int] = 8
    """Bits of a code: 2 to 6, which are packed into bytes, or 8 for one code of :meth:`code_dtype` per
    element, however wide that is."""
    state_bits: ClassVar[int | None] = None
    """Of a trellis, bits of a state: a code and those before it along the channels, around the end; up to 8
    more than :attr:`bits`. ``decode`` reads states (int32) in place of codes, and ``encode`` chooses the
    codes of whole rows, whose channels are the last axis: see :func:`trellis_codes`."""
    scale_dtype: ClassVar[DTypeLike | None] = jnp.float32
    """Dtype of a stored scale, float32 or an integer one; None for a format without scales. A nonzero scale
    should be a normal float32 number, and so should its product with the smallest nonzero value of a code."""
    bound: ClassVar[float]
    """Largest error |x - x̂|, in units of the block's scale."""
    gaussian_loss: ClassVar[float | None] = None
    """The most that is lost of gaussian values, as a share of their power, by a format whose :attr:`bound`
    says little of a single element, as a trellis; law 1 holds it to this as well."""
    levels: ClassVar[tuple[float, float] | None] = None
    """The lowest and the highest decoded value, if decoded values are evenly spaced; None otherwise. Wrappers
    that add offsets need it."""
    elementwise: ClassVar[bool] = True
    """True if kernels may call this format's methods on their tiles, as far as tracing shows them
    elementwise; False keeps kernels away."""
    nan_scale: ClassVar[float | int | None] = math.nan
    """The stored scale that reads as NaN; None if no value does."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        check_class(cls, before=Quantizer)

    def __post_init__(self) -> None:
        check_attributes(self)
        if not self.granularity:
            object.__setattr__(self, "granularity", self.granularities[0])
        check_granularity(self.name, self.granularity, self.granularities)
        check_methods(self)

    # What every format gives.

    @abc.abstractmethod
    def scale(self, absmax: jax.Array) -> jax.Array:
        """Return the stored scale of a block from its largest magnitude (float32): the scale rule.

        It must not fall as ``absmax`` rises, and is 0 exactly where ``absmax`` is; with a
        :attr:`global_scale` that one is 0 there instead. Static scales are chosen by it where a whole array
        is quantized or a model calibrated, and are never 0: a fresh pool has that of ``absmax`` 0.
        """

    @abc.abstractmethod
    def encode(self, units: jax.Array) -> jax.Array:
        """Return codes, one an element, of float32 values in units of their scale."""

    @abc.abstractmethod
    def decode(self, codes: jax.Array, dtype: DTypeLike) -> jax.Array:
        """Return the values of codes, in units of their scale, as ``dtype``; elementwise.

        They must be exact in bfloat16 and float16, since attention contracts in the dtype of its query. Fresh
        pages hold code 0, which must decode to a finite number, whatever it means.
        """

    # What few formats have: None, or an object.

    @property
    def growth(self) -> GrowthRule | None:
        """How scales that tokens share grow; None if they cannot: every write must then cover whole blocks.

        By default a block is fitted to its new extremes, and its codes are rounded again. Static scales do
        not grow, nor those of a trellis.
        """
        return None if self.has_static_scales or self.state_bits is not None else FitAgain(self)

    @property
    def block_fit(self) -> BlockFitRule | None:
        """How scales follow from all values of a block, as its norm does; None if from its extremes alone.

        :meth:`scale` is the scale of a block all of whose magnitudes are ``absmax`` then. Such scales do not
        grow: :attr:`growth` must be None, and no two tokens may share one, but in pages that are quantized
        once.
        """
        return None

    @property
    def offset(self) -> OffsetRule | None:
        """How stored scales carry an offset that is added to their block; None where they carry none."""
        return None

    @property
    def global_scale(self) -> GlobalScaleRule | None:
        """The second level of scales, one per token and KV head; None where there is none."""
        return None

    @property
    def transform(self) -> TransformRule | None:
        """The linear map along the channels that is applied before values are quantized; None for none."""
        return None

    # What follows from these, and may be overridden.

    @property
    def has_static_scales(self) -> bool:
        """True if all pages share scales, which are given: writes, resets and copies keep them."""
        return self.granularity in STATIC

    @property
    def needs_exact_pages(self) -> bool:
        """True if tokens share scales that cannot grow: pages are packed whole, and are exact until then."""
        return self.granularity in SHARED and self.growth is None

    @property
    def order_bound(self) -> float:
        """The largest difference, in units of the scale, that the order of writes makes; 0 is bit for bit.

        Override it if scales that tokens share grow by :class:`FitAgain`: how often codes are rounded again
        depends on the order of writes.
        """
        return 0.0

    @property
    def of_whole_blocks(self) -> "Quantizer":
        """The format of pages that are quantized once, from all their rows, as beside exact ones: itself.

        Override it in a format whose scales grow, if a block that is seen whole can be held better.
        """
        return self

    @property
    def writable(self) -> bool:
        """True: arrays of a quantizer can be written to, those that lazy reads make of them cannot."""
        return True

    def code_dtype(self, dtype: DTypeLike) -> Any:
        """Return the dtype of what ``decode`` reads in an array of logical ``dtype``: encode's, or int32."""
        return encoded_dtype(self) if self.state_bits is None else jnp.int32

    def multiplier(self, scales: jax.Array) -> jax.Array:
        """Return stored scales as float32 factors."""
        return scales.astype(jnp.float32)

    def fit(self, low: jax.Array, high: jax.Array) -> jax.Array:
        """Return the stored scale of a block from its least and greatest value (float32).

        It is 0 for a block of zeros alone: growth takes 0 for a block to which nothing was written.
        """
        return self.scale(jnp.maximum(-low, high))

    def encode_under(self, x: jax.Array, scales: jax.Array) -> jax.Array:
        """Return codes of float32 ``x`` under stored ``scales`` (broadcast); a zero scale encodes zeros.

        Of a trellis :meth:`to_units` and :meth:`encode` are called, and not this method.
        """
        return self.encode(self.to_units(x, scales))

    def to_units(self, x: jax.Array, scales: jax.Array) -> jax.Array:
        """Return float32 ``x`` less its offset, in units of stored ``scales`` (broadcast)."""
        if self.offset is not None:
            x = x - self.offset.from_scales(scales)
        return self.in_units(x, scales)

    def in_units(self, x: jax.Array, scales: jax.Array) -> jax.Array:
        """Return float32 ``x`` in units of stored ``scales`` (broadcast), the same bits in every program."""
        return in_units(x, self.multiplier(scales))

    def error_bound(self, x: jax.Array, multipliers: jax.Array) -> jax.Array:
        """Return the largest |x - x̂| for each element of ``x`` (..., channels), given its block's factor."""
        return jnp.broadcast_to(self.bound * jnp.abs(multipliers), x.shape)

    def block(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Return the block on an array (..., slots, head_dim), such as a pool.

        Raises:
            ValueError: the array has no such axes, or the group does not divide head_dim.
        """
        return page_block(self, shape)

    # What the framework makes of it.

    def quantize(self, array: ArrayLike, dtype: DTypeLike | None = None) -> QuantizedArray:
        """Return the whole of ``array`` (..., slots, head_dim) quantized; its last two axes are one page.

        Args:
            array: floats; NaN is stored as 0 and infinities as the largest finite number.
            dtype: the logical dtype; the array's own if None.

        Raises:
            TypeError: the array is not of a real floating-point dtype.
            ValueError: the group does not divide head_dim, or codes do not fill whole bytes.
        """
        array = jnp.asarray(array)
        return quantize(array, self, self.block(array.shape), dtype)

    def empty(self, shape: Sequence[int], dtype: DTypeLike) -> QuantizedArray:
        """Return an array (..., slots, head_dim) in which nothing was written: it reads as zeros.

        Args:
            shape: (..., slots, head_dim).
            dtype: the logical dtype.
        """
        return empty(shape, self, self.block(shape), dtype)

    @property
    def config(self) -> dict[str, Any]:
        """A dictionary of plain JSON values that the quantizer can be made of again."""
        return {"name": self.name, **dataclasses.asdict(self)}

    def __str__(self) -> str:
        """Return the spelling that makes this quantizer."""
        if self.granularity == self.granularities[0]:
            return self.name
        return f"{self.name}:{self.granularity}"


@functools.lru_cache
def encoded_dtype(quantizer: Quantizer) -> Any:
    """Return the dtype of ``quantizer.encode``'s codes, found by tracing: nothing is computed."""
    return jax.eval_shape(quantizer.encode, TILE).dtype
