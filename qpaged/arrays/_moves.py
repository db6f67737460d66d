"""Moves: reads that carry codes and scales together and decode nothing.

Each function means what the ``lax`` function of its name means. Where a move cuts through blocks, these are
first refined: cut into smaller ones that repeat their scale.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from qpaged.arrays._blocks import refine
from qpaged.arrays._indices import clipped
from qpaged.arrays._quantized import QuantizedArray


def move(array: QuantizedArray, codes: Any, scales: Callable[[jax.Array], jax.Array]) -> QuantizedArray:
    """The array whose codes have become ``codes`` and whose scales and offsets go through ``scales``."""
    moved = (None if part is None else scales(part) for part in (array.scales, array.offsets))
    return array.like(codes, *moved)


def transpose(array: QuantizedArray, permutation: Sequence[int]) -> QuantizedArray:
    return move(array, lax.transpose(array.codes, permutation), lambda s: lax.transpose(s, permutation))


def broadcast_in_dim(array: QuantizedArray, shape: Sequence[int], dims: Sequence[int]) -> QuantizedArray:
    """New and stretched axes have one block: what is repeated shares its scale."""

    def spread(scales):
        target = [1] * len(shape)
        for axis, dim in enumerate(dims):
            target[dim] = scales.shape[axis]
        return lax.broadcast_in_dim(scales, target, dims)

    return move(array, lax.broadcast_in_dim(array.codes, shape, dims), spread)


def reshape(array: QuantizedArray, shape: Sequence[int]) -> QuantizedArray:
    """Split and merge axes; blocks that do not tile the new axes are refined until they do."""
    before, block, shape = array.shape, array.block, tuple(shape)
    if array.size == 0:
        return move(array, array.codes.reshape(shape), lambda s: jnp.zeros(shape, s.dtype))

    def regroup(scales):
        counts = [0] * len(shape)
        for old, new in _groups(before, shape):
            old_block, new_block = _common(
                [before[a] for a in old], [block[a] for a in old], [shape[a] for a in new]
            )
            for axis, b in zip(old, old_block, strict=True):
                scales = refine(scales, axis, block[axis] // b)
            for axis, b in zip(new, new_block, strict=True):
                counts[axis] = shape[axis] // b
        return scales.reshape(counts)

    return move(array, array.codes.reshape(shape), regroup)


def _groups(before: Sequence[int], after: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """The shortest runs of old and new axes that hold the same elements."""
    groups = []
    i = j = 0
    while i < len(before) or j < len(after):
        old, new = [i] if i < len(before) else [], [j] if j < len(after) else []
        while math.prod(before[a] for a in old) != math.prod(after[a] for a in new):
            if math.prod(before[a] for a in old) < math.prod(after[a] for a in new):
                old.append(i + len(old))
            else:
                new.append(j + len(new))
        groups.append((old, new))
        i, j = i + len(old), j + len(new)
    return groups


def _run(lengths: Sequence[int], block: Sequence[int]) -> int:
    """Length of the runs of flattened elements that surely share a scale."""
    run = 1
    for length, b in zip(reversed(lengths), reversed(block), strict=True):
        run *= b
        if b != length:
            break
    return run


def _split(lengths: Sequence[int], run: int) -> list[int]:
    """Blocks of the new axes: the largest that the run allows, from the last axis on."""
    block: list[int] = []
    for length in reversed(lengths):
        b = math.gcd(run, length)
        block.insert(0, b)
        run = run // b if b == length else 1
    return block


def _common(old: Sequence[int], block: Sequence[int], new: Sequence[int]) -> tuple[list[int], list[int]]:
    """Blocks of the old and of the new axes that cut the flattened elements into the same runs."""
    run = _run(old, block)
    while True:
        new_block = _split(new, run)
        old_block = _split(old, math.prod(new_block))
        run = math.prod(old_block)
        if run == math.prod(new_block):
            return old_block, new_block


def squeeze(array: QuantizedArray, dimensions: Sequence[int]) -> QuantizedArray:
    return move(array, lax.squeeze(array.codes, dimensions), lambda s: lax.squeeze(s, dimensions))


def slice_(array: QuantizedArray, start: Sequence[int], limit: Sequence[int], strides: Any) -> QuantizedArray:
    strides = (1,) * array.ndim if strides is None else tuple(strides)
    block = array.block

    def cut(scales):
        for axis, window in enumerate(zip(block, start, limit, strides, strict=True)):
            scales = _slice_scales(scales, axis, *window)
        return scales

    return move(array, lax.slice(array.codes, start, limit, strides), cut)


def _slice_scales(scales: jax.Array, axis: int, block: int, low: int, high: int, stride: int) -> jax.Array:
    if high <= low:
        return lax.slice_in_dim(scales, 0, 0, axis=axis)
    if low // block == (high - 1) // block:  # inside one block
        return lax.slice_in_dim(scales, low // block, low // block + 1, axis=axis)
    kept = math.gcd(block, low, high) if stride == 1 else 1
    fine = refine(scales, axis, block // kept)
    return lax.slice_in_dim(fine, low // kept, high // kept, stride, axis)


def dynamic_slice(array: QuantizedArray, start: Sequence[Any], sizes: Sequence[int]) -> QuantizedArray:
    shape, block = array.shape, array.block
    start = clamped(start, shape, sizes)

    def cut(scales):
        for axis, (b, at, size) in enumerate(zip(block, start, sizes, strict=True)):
            count = scales.shape[axis]
            if size == 0:
                scales = lax.slice_in_dim(scales, 0, 0, axis=axis)
            if size == 0 or count == 1 or size == shape[axis]:
                continue
            touched = min(count, -(-(size - 1) // b) + 1)
            first = jnp.minimum(at // b, count - touched)
            scales = lax.dynamic_slice_in_dim(scales, first, touched, axis)
            if b > 1:
                fine = refine(scales, axis, b)
                scales = lax.dynamic_slice_in_dim(fine, at - first * b, size, axis)
        return scales

    return move(array, lax.dynamic_slice(array.codes, start, sizes), cut)


def clamped(start: Sequence[Any], shape: Sequence[int], sizes: Sequence[int]) -> list[jax.Array]:
    """Start indices as ``lax.dynamic_slice`` clamps them, int32."""
    limits = [length - size for length, size in zip(shape, sizes, strict=True)]
    return [jnp.clip(clipped(jnp.asarray(at)), 0, top) for at, top in zip(start, limits, strict=True)]


def concatenate(arrays: Sequence[QuantizedArray], dimension: int) -> QuantizedArray:
    """Arrays of one format, end to end."""
    return _join(arrays, lambda parts: lax.concatenate(parts, dimension))


def stack(arrays: Sequence[QuantizedArray], axis: int) -> QuantizedArray:
    """Arrays of one format, side by side along a new axis."""
    return _join(arrays, lambda parts: jnp.stack(parts, axis))


def unstack(array: QuantizedArray, axis: int) -> list[QuantizedArray]:
    """The slices along ``axis``, without it."""
    sizes = [length if a != axis else 1 for a, length in enumerate(array.shape)]

    def at(index):
        start = [0 if a != axis else index for a in range(array.ndim)]
        return slice_(array, start, [s + n for s, n in zip(start, sizes, strict=True)], None)

    return [squeeze(at(index), (axis,)) for index in range(array.shape[axis])]


def select(which: jax.Array, cases: Sequence[QuantizedArray]) -> QuantizedArray:
    """One of the cases, by a scalar predicate."""
    return _join(cases, lambda parts: lax.select_n(which, *parts))


def _join(arrays: Sequence[QuantizedArray], joined: Callable[[list], jax.Array]) -> QuantizedArray:
    blocks = [math.gcd(*extents) for extents in zip(*(a.block for a in arrays), strict=True)]
    arrays = [refined(a, blocks) for a in arrays]
    parts = [[getattr(a, name) for a in arrays] for name in ("codes", "scales", "offsets")]
    return arrays[0].like(*(None if part[0] is None else joined(part) for part in parts))


def refined(array: QuantizedArray, block: Sequence[int]) -> QuantizedArray:
    """The same array with smaller blocks, which divide its own."""

    def cut(scales):
        for axis, (old, new) in enumerate(zip(array.block, block, strict=True)):
            scales = refine(scales, axis, old // new)
        return scales

    return move(array, array.codes, cut)


def gather(
    array: QuantizedArray, index: jax.Array, numbers: Any, sizes: Sequence[int], mode: Any, fill_value: Any
) -> QuantizedArray | None:
    """``lax.gather``; None where a window cuts through blocks at places known only at run time.

    What is read past the end is NaN, or 0 where ``fill_value`` is, as from a plain array.
    """
    counts = array.shape if array.scales is None else array.scales.shape
    batched = getattr(numbers, "operand_batching_dims", ())
    to_nan = fill_value is None or np.isnan(fill_value)
    if not (to_nan or fill_value == 0) or not all(
        count == length or (axis not in batched and (count == 1 or size in (1, length)))
        for axis, (size, length, count) in enumerate(zip(sizes, array.shape, counts, strict=True))
    ):
        return None
    fill = past_end(array) if to_nan else (0, 0)
    if fill is None:
        return None
    code_fill, scale_fill = fill
    codes = lax.gather(array.codes, index, numbers, sizes, mode=mode, fill_value=code_fill)

    def read(scales):
        extents = [
            count if size == length else min(size, count)
            for size, length, count in zip(sizes, array.shape, counts, strict=True)
        ]
        blocks = _block_index(array, index, numbers.start_index_map, sizes, mode)
        return lax.gather(scales, blocks, numbers, extents, mode=mode, fill_value=scale_fill)

    return move(array, codes, read)


def _block_index(array: QuantizedArray, index: jax.Array, axes: Sequence[int], sizes, mode) -> jax.Array:
    """Indices of blocks for indices of elements, past the end where those are."""
    index = clipped(index)
    tops = jnp.array([array.shape[axis] - sizes[axis] for axis in axes], jnp.int32)
    if mode == lax.GatherScatterMode.CLIP:
        index = jnp.clip(index, 0, tops)
    blocks = index // jnp.array([array.block[axis] for axis in axes], jnp.int32)
    past = jnp.array([array.shape[axis] for axis in axes], jnp.int32)
    return jnp.where((index >= 0) & (index <= tops), blocks, past)


def past_end(array: QuantizedArray) -> tuple[Any, Any] | None:
    """Codes and scales that read as NaN; None where the stored scales have no such value."""
    if array.scales is not None:
        scale = array.quantizer.past_end
        return None if scale is None else (0, scale)
    dtype, quantizer = array.dtype, array.quantizer
    while isinstance(quantizer, Converted):
        dtype, quantizer = quantizer.dtype, quantizer.quantizer
    return int(np.full((), np.nan, dtype).view(array.codes.dtype)), None


def convert(array: QuantizedArray, dtype: Any) -> QuantizedArray:
    """Another logical floating-point dtype; codes and scales stay."""
    dtype = jnp.dtype(dtype)
    quantizer: Any = array.quantizer
    if array.scales is None or not quantizer.writable:  # what the codes mean hangs on the dtype they had
        quantizer = Converted(quantizer, array.dtype)
    return array.like(array.codes, array.scales, array.offsets, quantizer=quantizer, dtype=dtype)


@dataclass(frozen=True)
class Converted:
    """A format read as another dtype than its codes were made for: a view, not to be written to."""

    quantizer: Any
    dtype: Any
    writable: ClassVar[bool] = False

    @property
    def past_end(self) -> Any:
        return self.quantizer.past_end

    def decode(self, codes: jax.Array, dtype: Any) -> jax.Array:
        return self.quantizer.decode(codes, self.dtype).astype(dtype)

    def multiplier(self, scales: jax.Array) -> jax.Array:
        return self.quantizer.multiplier(scales)


@dataclass(frozen=True)
class Scaled:
    """A format read through float32 factors instead of its stored scales: a view, not to be written to."""

    quantizer: Any
    writable: ClassVar[bool] = False
    past_end: ClassVar[float] = math.nan

    def decode(self, codes: jax.Array, dtype: Any) -> jax.Array:
        return self.quantizer.decode(codes, dtype)

    def multiplier(self, scales: jax.Array) -> jax.Array:
        return scales


def scaled(array: QuantizedArray, factor: jax.Array) -> QuantizedArray:
    """``array`` times a scalar: the codes stay, the scales become float32 factors."""
    factor = jnp.asarray(factor).astype(jnp.float32)
    if array.scales is None:
        one = jnp.ones((1,) * array.ndim, jnp.float32)
        return array.like(
            array.codes, one * factor, quantizer=Scaled(Converted(array.quantizer, array.dtype))
        )
    offsets = None if array.offsets is None else array.offsets * factor
    return array.like(array.codes, array.multipliers() * factor, offsets, quantizer=Scaled(array.quantizer))
