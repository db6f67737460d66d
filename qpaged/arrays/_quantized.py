"""QuantizedArray: codes, the scales of their blocks, and the quantizer that reads them."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, TypeGuard

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from qpaged._compat import explicit_sharding, with_auto_axes
from qpaged._promotion import promoting_ranks
from qpaged.arrays._blocks import block_shape, expand_scales, split_blocks
from qpaged.arrays._encoding import multipliers
from qpaged.arrays._lane_rows import from_lane_rows, slot_shape, to_lane_rows
from qpaged.arrays._packing import codes_per_byte, has_planes, logical_length, unpack
from qpaged.arrays._plain_use import PlainUse
from qpaged.arrays._protocol import ArrayFormat
from qpaged.arrays._trellis import unpacked_states
from qpaged.implicit import ImplicitArray, aux_field


class BlockParts(NamedTuple):
    """What an array stores for each block, beside the codes. A part that the format does not have is None.

    Attributes:
        scales: one axis for each of the codes'; its length is the number of blocks along that axis.
        global_scale: second-level scales, in the shape of ``scales`` with 1 along the channel axis.
        offset: float32, in the shape of ``scales``: what arrays made by lazy reads add to each block. None
            where the quantizer derives it from the stored scale, or there is none.
    """

    scales: jax.Array | None
    global_scale: jax.Array | None = None
    offset: jax.Array | None = None

    def map(self, change: Callable[..., jax.Array], *others: "BlockParts") -> "BlockParts":
        """Return the parts with ``change`` applied to each that is there, with those of ``others``."""
        changed = []
        for part, *beside in zip(self, *others, strict=True):
            changed.append(None if part is None else change(part, *beside))
        return BlockParts(*changed)


PATHS = "codes", "scales", "outer", "offsets"
"""The names of the children in paths of pytrees, which stay as they are: checkpoints name arrays by paths."""


@dataclass(eq=False, repr=False, kw_only=True)
class QuantizedArray(PlainUse, ImplicitArray):
    """An array held as integer codes and one scale per block: x̂ = decode(codes) · scale (+ offset).

    Attributes:
        stored: the codes as they lie in memory, ``slots_per_row`` slots to a row; :attr:`codes` has them one
            slot to a row.
        scales: one for each block; see :class:`BlockParts`.
        global_scale: the second level of scales; see :class:`BlockParts`.
        offset: of arrays made by lazy reads; see :class:`BlockParts`.
        quantizer: static; says how codes and scales are read and written.
        channel_axis: static; the axis of the channels (head_dim), counted from the end, so that an axis that
            ``vmap`` adds in front does not move it. It matters to formats that pack codes or transform
            channels, and stays -1 for the others.
        slots_per_row: static; 1 but for the pools of a cache, whose rows fill the lanes of a TPU. There the
            channels are the last axis and the slots the one before, also under ``vmap``.
        dtype: static; the logical floating-point dtype.

    The logical ``shape`` and the ``block`` shape follow from the children, so they stay right inside vmap,
    scan and shard_map. To programs under ``use_implicit_args`` it is an array of ``shape`` and ``dtype``.
    """

    has_derivative: ClassVar[bool] = False  # codes are integers, and scales are fitted to what is written
    stored: jax.Array
    scales: jax.Array | None
    global_scale: jax.Array | None = None
    offset: jax.Array | None = None
    # Always given; a default only because the fields of the base class have one.
    quantizer: ArrayFormat = aux_field(default=None)  # type: ignore[assignment]  # noqa: RUF009
    channel_axis: int = aux_field(default=-1)
    slots_per_row: int = aux_field(default=1)

    # qax's base class would compare the children, and could not be hashed.
    __eq__ = PlainUse.__eq__
    __hash__ = object.__hash__

    def __post_init__(self) -> None:
        """Do nothing, where the base class would trace ``materialize`` to infer the shape and the dtype."""

    @property  # type: ignore[misc]  # in place of a field, as the base class allows
    def shape(self) -> tuple[int, ...]:
        codes_shape = slot_shape(self.stored.shape, self.slots_per_row)
        return logical_shape(codes_shape, self.quantizer.bits, self.channel_axis)

    @shape.setter
    def shape(self, _: Any) -> None:
        """Ignore the inherited field: a stored shape would go stale under vmap."""

    @property
    def ndim(self) -> int:
        return len(self.stored.shape)  # lane rows merge slots and channels, and keep the number of axes

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def codes(self) -> jax.Array:
        """Integers (..., slots, width), out of their lane rows; those of under 8 bits are packed."""
        return from_lane_rows(self.stored, self.slots_per_row)

    @property
    def parts(self) -> BlockParts:
        """All the children but the codes."""
        return BlockParts(self.scales, self.global_scale, self.offset)

    @property
    def block_scales(self) -> jax.Array:
        """:attr:`scales`, of a format that has them: for code that runs for such formats alone."""
        assert self.scales is not None
        return self.scales

    @property
    def channels(self) -> int:
        """:attr:`channel_axis`, counted from the front."""
        return self.channel_axis % self.ndim

    @property
    def codes_per_byte(self) -> int:
        """Codes in a byte; of codes in two planes, in one of the low plane."""
        return codes_per_byte(self.quantizer.bits)

    @property
    def whole_axes(self) -> tuple[int, ...]:
        """Axes along which leaves cannot be cut apart: channels that go together, or lie in planes."""
        quantizer = self.quantizer
        together = quantizer.transform is not None or quantizer.state_bits is not None
        return (self.channels,) if together or has_planes(quantizer.bits) else ()

    @property
    def block(self) -> tuple[int, ...]:
        """Extents of the box of elements that share one scale; ones where there are no scales."""
        if self.scales is None:
            return (1,) * self.ndim
        return block_shape(self.shape, self.scales.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of all children."""
        return sum(leaf.nbytes for leaf in jax.tree_util.tree_leaves(self))

    def __repr__(self) -> str:
        children = {"codes": self.stored, **self.parts._asdict()}
        shown = ", ".join(f"{name} {short(child)}" for name, child in children.items() if child is not None)
        holds_arrays = getattr(self.stored, "shape", None) is not None  # as not in trees of other things
        logical = short(self) if holds_arrays else jnp.dtype(self.dtype).name
        return f"QuantizedArray({self.quantizer} {logical}: {shown})"

    def tree_flatten_with_keys(self):
        children, aux = self.tree_flatten()
        keys = map(jax.tree_util.GetAttrKey, PATHS)
        return list(zip(keys, children, strict=True)), aux

    def tree_flatten(self):
        children = [self.stored, self.scales, self.global_scale, self.offset]
        return children, (self.quantizer, self.channel_axis, self.slots_per_row, self.dtype)

    @classmethod
    def tree_unflatten(cls, aux_data, children):
        self = cls.__new__(cls)
        self.stored, self.scales, self.global_scale, self.offset = children
        self.quantizer, self.channel_axis, self.slots_per_row, self.dtype = aux_data
        return self

    def like(
        self,
        codes: jax.Array,
        parts: BlockParts,
        *,
        quantizer: ArrayFormat | None = None,
        channel_axis: int | None = None,
        slots_per_row: int | None = None,
        dtype: DTypeLike | None = None,
    ) -> "QuantizedArray":
        """Return an array with these codes (..., slots, width) and parts; all else stays, unless given.

        Codes of the shape of :attr:`codes` are put into lane rows as this array's are.
        """
        if slots_per_row is None:
            same_shape = tuple(codes.shape) == slot_shape(self.stored.shape, self.slots_per_row)
            slots_per_row = self.slots_per_row if same_shape else 1
        return QuantizedArray(
            stored=to_lane_rows(codes, slots_per_row),
            **parts._asdict(),
            quantizer=self.quantizer if quantizer is None else quantizer,
            channel_axis=self.channel_axis if channel_axis is None else channel_axis,
            slots_per_row=slots_per_row,
            dtype=self.dtype if dtype is None else dtype,
        )

    def with_stored(self, stored: jax.Array, parts: BlockParts) -> "QuantizedArray":
        """Return an array with these parts and codes, in lane rows as :attr:`stored` is; all else stays."""
        return QuantizedArray(
            stored=stored,
            **parts._asdict(),
            quantizer=self.quantizer,
            channel_axis=self.channel_axis,
            slots_per_row=self.slots_per_row,
            dtype=self.dtype,
        )

    def explicit_sharding(self) -> Any:
        """Return the sharding on a mesh with Explicit axes, which is that of the codes; None elsewhere."""
        return explicit_sharding(self.stored)

    def materialize(self) -> jax.Array:
        """Return the values in the logical dtype."""
        sharding = self.explicit_sharding()
        if sharding is None:
            return self.dequantize(self.dtype)
        return with_auto_axes(lambda array: array.dequantize(array.dtype), sharding)(self)

    @promoting_ranks
    def dequantize(self, dtype: DTypeLike = jnp.float32) -> jax.Array:
        """Return the values as ``dtype``: computed in float32, rounded once, clipped to what is finite."""
        if self.scales is None or self.size == 0:  # the codes are the bits of values, and have no scales
            return self.values(self.dtype).astype(dtype)
        values = split_blocks(self.values(jnp.float32), self.scales.shape)
        factors, offset = self.multipliers(), self.block_offset()
        if offset is None:
            x = values * expand_scales(factors)
        else:
            # A product may be too large for float32 where its sum with the offset is not, so both are
            # quartered first. Small factors cannot overflow, and might become subnormal.
            down = jnp.where(jnp.abs(factors) > 1, jnp.float32(0.25), jnp.float32(1))
            x = values * expand_scales(factors * down) + expand_scales(offset * down)
            x = x / expand_scales(down)
        x = x.reshape(self.shape)
        if self.quantizer.transform is not None:
            x = self.quantizer.transform.inverse(x, self.channel_axis)
        largest = jnp.float32(jnp.finfo(dtype).max)
        # An overflow saturates. A code that is infinite or NaN itself, as of fp8, stays what it is; so does
        # the NaN scale of a read past the end, which the clip passes on.
        finite = jnp.isfinite(values).reshape(self.shape)
        return jnp.where(finite, jnp.clip(x, -largest, largest), x).astype(dtype)

    def values(self, dtype: DTypeLike) -> jax.Array:
        """Return the codes as numbers in units of their scale, exact in bfloat16 and wider dtypes.

        Without scales they are what the array stands for, rounded to ``dtype``.
        """
        decoded_as = self.dtype if self.scales is None else dtype
        return self.quantizer.decode(self.unpacked(), decoded_as).astype(dtype)

    def unpacked(self) -> jax.Array:
        """Return what the format decodes, in the logical shape: codes, or the states of a trellis."""
        bits, state_bits = self.quantizer.bits, self.quantizer.state_bits
        if state_bits is None:
            return unpack(self.codes, bits, self.channel_axis, self.quantizer.code_dtype(self.dtype))
        codes = unpack(self.codes, bits, self.channel_axis, jnp.uint8)
        return unpacked_states(codes, bits, state_bits, self.channel_axis)

    def multipliers(self) -> jax.Array:
        """Return the scales as float32 factors, in the shape of ``scales``."""
        return multipliers(self.quantizer, self.block_scales, self.global_scale)

    def block_offset(self) -> jax.Array | None:
        """Return what is added to each block, float32 in the shape of ``scales``; None where nothing is."""
        if self.offset is not None or self.quantizer.offset is None:
            return self.offset
        return self.quantizer.offset.from_scales(self.block_scales)


def short(child: Any) -> str:
    """Return dtype and shape of an array, "int8[2,8,16]"; of what trees hold in its place, its repr."""
    shape, dtype = getattr(child, "shape", None), getattr(child, "dtype", None)
    if shape is None or dtype is None:
        return repr(child)
    return f"{jnp.dtype(dtype).name}[{','.join(map(str, shape))}]"


def is_quantized(leaf: Any) -> TypeGuard[QuantizedArray]:
    """Return True for a :class:`QuantizedArray`, which pytree functions would take apart otherwise."""
    return isinstance(leaf, QuantizedArray)


def logical_shape(shape: Sequence[int], bits: int, channel_axis: int) -> tuple[int, ...]:
    """Return the shape of an array whose codes of ``bits`` have ``shape``."""
    lengths = list(shape)
    if lengths:
        lengths[channel_axis] = logical_length(bits, lengths[channel_axis])
    return tuple(lengths)
