"""Trellis codes: each is read with those before it, and chosen together with all of its row.

A *state* is a code with the ones before it along the channels, from the first channel back to the last: a
row closes to a ring, and needs no bits beside its codes. ``decode`` reads a state where other formats read a
code. So 2 bits choose among four of the 1,024 values that states of 10 bits have, and which four changes from
channel to channel (Marcellin and Fischer 1990; QTIP, Tseng et al. 2024). The Viterbi algorithm finds the
codes whose values are nearest to a row.

A state has a *window* of each plane of :mod:`qpaged.arrays._packing`, the low plane's in its lowest bits. In
a window the newest code has the highest bits; of the oldest one only its own highest bits may be left.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_batching import custom_vmap

from qpaged._compat import explicit_sharding, with_auto_axes
from qpaged.arrays._packing import BYTE, PLANES, codes_per_byte, has_planes, split_planes

SEAM = 32  # channels on each side of the ring's seam, from which the state there is found
COLUMNS_AT_ONCE = 128
REACH = 2  # of what is followed, in units of the largest value; what is beyond counts as this
LARGEST_VALUE = 128
FORBIDDEN = 2**24  # cost of a state that no row may begin with


def windows(bits: int, state_bits: int) -> tuple[int, ...]:
    """Return how many bits of a state come from each plane of its codes, the low plane first."""
    _, *high = PLANES[bits]
    whole, rest = divmod(state_bits, bits)
    if not high:
        return (state_bits,)
    of_high = whole * high[0] + min(rest, high[0])
    return state_bits - of_high, of_high


def unpacked_states(codes: jax.Array, bits: int, state_bits: int, axis: int) -> jax.Array:
    """Return the state of each code, int32; ``codes`` are uint8 without sign, one an element."""
    codes, states, below = codes.astype(jnp.int32), jnp.zeros((), jnp.int32), 0
    shift = 0
    for plane, window in zip(PLANES[bits], windows(bits, state_bits), strict=True):
        of_plane = (codes >> shift) & ((1 << plane) - 1)
        states = states | (_window(of_plane, plane, window, axis) << below)
        shift, below = shift + plane, below + window
    return states


def _window(codes: jax.Array, bits: int, window: int, axis: int) -> jax.Array:
    """Return the newest ``window`` bits of codes of one plane up to each."""
    count = -(-window // bits)
    newest_first = [jnp.roll(codes, age, axis) << (bits * (count - 1 - age)) for age in range(count)]
    return functools.reduce(jnp.bitwise_or, newest_first) >> (bits * count - window)


def extract_states(packed: jax.Array, bits: int, state_bits: int, byte_index: int, slots: int) -> jax.Array:
    """Return the state of the code at ``byte_index`` of each byte of the low plane, int32; within a kernel.

    Args:
        packed: int32 with a byte in each; ``slots`` slots behind each other along the last axis.
        bits: of a code.
        state_bits: of a state.
        byte_index: which code of a byte of the low plane.
        slots: how many slots there are, each a ring of its own, and with planes of its own.
    """
    if not has_planes(bits):
        return _states_at(packed, BYTE, bits, state_bits, byte_index, slots)
    low_bits, high_bits = PLANES[bits]
    low_window, high_window = windows(bits, state_bits)
    in_byte = codes_per_byte(bits)
    of_slots = []
    for slot in range(slots):
        low, high = split_planes(packed, bits, -1, slot, slots)
        field = in_byte * high_bits  # of a byte of the high plane, with the codes of one of the low plane
        fields = [(high >> start) & ((1 << field) - 1) for start in range(0, BYTE, field)]
        high = lax.concatenate(fields, high.ndim - 1)
        low_states = _states_at(low, BYTE, low_bits, low_window, byte_index, 1)
        high_states = _states_at(high, field, high_bits, high_window, byte_index, 1)
        of_slots.append(low_states | (high_states << low_window))
    return lax.concatenate(of_slots, packed.ndim - 1)


def _states_at(
    fields: jax.Array, width: int, bits: int, window: int, byte_index: int, slots: int
) -> jax.Array:
    """Return the window of the code at ``byte_index`` of fields of ``width`` bits that follow each other."""
    words = (fields << width) | _fields_before(fields, slots)
    return (words >> (width + bits * (byte_index + 1) - window)) & ((1 << window) - 1)


def _fields_before(fields: jax.Array, slots: int) -> jax.Array:
    """Return what is before each field along the last axis; before the first of a slot, the slot's last."""
    before = jnp.roll(fields, 1, -1)
    if slots == 1:
        return before
    of_slot = fields.shape[-1] // slots
    is_first = lax.broadcasted_iota(jnp.int32, fields.shape, fields.ndim - 1) % of_slot == 0
    return jnp.where(is_first, jnp.roll(fields, 1 - of_slot, -1), before)


class _Paths(NamedTuple):
    """The trellis as the Viterbi algorithm walks it: a path's last codes, the newest in the lowest bits.

    Attributes:
        bits: of a code, and of a step.
        values: (2^state_bits,) what a path's last state decodes to.
        codes: (2^bits,) the code that the lowest bits of a path stand for.
    """

    bits: int
    values: np.ndarray
    codes: np.ndarray

    @property
    def choices(self) -> int:
        """How many codes there are."""
        return 2**self.bits

    @property
    def memories(self) -> int:
        """How many different things there are to remember of a state once its oldest code is forgotten."""
        return len(self.values) >> self.bits


def _paths(bits: int, state_bits: int, values: np.ndarray) -> _Paths:
    whole, rest = divmod(state_bits, bits)
    # Of its oldest code a path keeps the lowest bits, and a state the highest ones: so codes are turned.
    turned = np.arange(2**bits)
    codes = (turned & ((1 << rest) - 1)) << (bits - rest) | turned >> rest
    path = np.arange(2**state_bits)
    by_age = [codes[(path >> (bits * age)) & (2**bits - 1)] for age in range(whole)]
    by_age.append((path >> (bits * whole)) << (bits - rest))
    state, shift, below = np.zeros_like(path), 0, 0
    for plane, window in zip(PLANES[bits], windows(bits, state_bits), strict=True):
        count = -(-window // plane)
        of_plane = sum(
            ((by_age[age] >> shift) & (2**plane - 1)) << (plane * (count - 1 - age)) for age in range(count)
        )
        state |= (of_plane >> (plane * count - window)) << below
        shift, below = shift + plane, below + window
    return _Paths(bits, values[state], codes.astype(np.uint8))


def trellis_codes(units: jax.Array, bits: int, state_bits: int, values: np.ndarray) -> jax.Array:
    """Return the codes of each row of ``units`` (..., channels) whose states have the values nearest to it.

    Nearest by the sum of squares, among the rings with one memory at their seam: that of the best path
    through the channels around it. Sums are of integers, and so the same in every program. An element takes
    some 10 operations for each state.

    Args:
        units: float32, in units of the scale.
        bits: of a code, 2 to 6.
        state_bits: of a state; more than ``bits``, by 8 at most.
        values: (2^state_bits,) integers of at most 128 in magnitude, which states decode to.

    Returns:
        uint8 in the shape of ``units``, one code an element, not packed.

    Raises:
        ValueError: ``values`` are not so many integers, or a state has too few or too many bits.
    """
    values = np.asarray(values)
    if not (bits in PLANES and bits < BYTE and bits < state_bits <= bits + BYTE):
        raise ValueError(
            f"state_bits must be more than the bits of a code, 2 to 6, by at most 8, but came as "
            f"{state_bits} with codes of {bits}."
        )
    fits = np.issubdtype(values.dtype, np.integer) and values.shape == (2**state_bits,)
    if not (fits and np.abs(values.astype(np.int64)).max() <= LARGEST_VALUE):
        raise ValueError(
            f"values must be {2**state_bits:,} integers of at most {LARGEST_VALUE} in magnitude, one for "
            f"each state, but came as {values.dtype.name} of shape {values.shape}; round them to such."
        )
    units = lax.stop_gradient(jnp.asarray(units))  # rounding has no useful derivative
    sharding = explicit_sharding(units)
    encode = functools.partial(_codes_of_rows, paths=_paths(bits, state_bits, values))
    return encode(units) if sharding is None else with_auto_axes(encode, sharding)(units)


def _codes_of_rows(units: jax.Array, *, paths: _Paths) -> jax.Array:
    """Return the codes of rows (..., channels)."""

    @custom_vmap
    def of_rows(units: jax.Array) -> jax.Array:
        columns = units.reshape(-1, units.shape[-1]).T
        return _codes_of_columns(columns, paths).T.reshape(units.shape)

    @of_rows.def_vmap
    def _(axis_size: int, in_batched: list[bool], units: jax.Array) -> tuple[jax.Array, bool]:
        return of_rows(units), True  # rows of whatever axes; a batch that was mapped is one more

    return of_rows(units)


def _codes_of_columns(units: jax.Array, paths: _Paths) -> jax.Array:
    """Return the codes of columns [channels, n], so many at once that temporaries stay small."""
    channels, count = units.shape
    if count <= COLUMNS_AT_ONCE:
        return _codes(units, paths)
    padded = jnp.pad(units, ((0, 0), (0, -count % COLUMNS_AT_ONCE)))
    batches = padded.reshape(channels, -1, COLUMNS_AT_ONCE).swapaxes(0, 1)
    codes = lax.map(functools.partial(_codes, paths=paths), batches)
    return codes.swapaxes(0, 1).reshape(channels, -1)[:, :count]


def _codes(units: jax.Array, paths: _Paths) -> jax.Array:
    """Return the codes of columns [channels, n], which lie along the lanes of vectors."""
    channels, count = units.shape
    reach = float(REACH * np.abs(paths.values).max())
    quarters = jnp.round(4 * jnp.clip(units, -reach, reach)).astype(jnp.int32)
    around = min(SEAM, channels)
    near_seam = jnp.concatenate([quarters[channels - around :], quarters[:around]])
    nothing = jnp.zeros_like(near_seam[0])  # of the columns, and so divided over a mesh as they are
    free = jnp.broadcast_to(nothing, (len(paths.values), count))
    costs, came_from = _walk(near_seam, free, paths)
    at_seam = _walk_back(came_from, jnp.argmin(costs, axis=0), paths)[around - 1] % paths.memories
    memory = lax.broadcasted_iota(jnp.int32, costs.shape, 0) % paths.memories
    forbidden = jnp.where(memory == at_seam, 0, FORBIDDEN)
    costs, came_from = _walk(quarters, forbidden, paths)
    walked = _walk_back(came_from, jnp.argmin(costs + forbidden, axis=0), paths)
    return jnp.asarray(paths.codes)[walked % paths.choices]


def _walk(quarters: jax.Array, costs: jax.Array, paths: _Paths) -> tuple[jax.Array, jax.Array]:
    """Return the cost of the best path to each state, and the oldest code that the one to each memory forgot.

    Args:
        quarters: [steps, n] int32; what is followed, in quarters of the values' unit.
        costs: [2^state_bits, n] int32, of the states to begin with.
        paths: the trellis.

    Returns:
        [2^state_bits, n] int32, and [steps, memories, n] uint8.
    """
    values = jnp.asarray(paths.values, jnp.int32).reshape(paths.memories, paths.choices, 1)

    def step(costs: jax.Array, quarters: jax.Array) -> tuple[jax.Array, jax.Array]:
        by_oldest = costs.reshape(paths.choices, paths.memories, -1)
        # With the number of the oldest code in its lowest bits, the least cost tells which code it was.
        numbered = [(by_oldest[number] << paths.bits) | number for number in range(paths.choices)]
        least = functools.reduce(jnp.minimum, numbered)
        came_from = (least & (paths.choices - 1)).astype(jnp.uint8)
        best = least >> paths.bits
        best -= best.min(axis=0)  # so that sums stay within 32 bits, however many channels there are
        # 2 (x - v)² less 2 x², an integer
        new = best[:, None] + values * (2 * values - quarters)
        return new.reshape(costs.shape), came_from

    return lax.scan(step, costs, quarters)


def _walk_back(came_from: jax.Array, last: jax.Array, paths: _Paths) -> jax.Array:
    """Return the states [steps, n] of the paths that end in ``last`` [n]."""

    def step(state: jax.Array, came_from: jax.Array) -> tuple[jax.Array, jax.Array]:
        memory = state >> paths.bits
        oldest = jnp.take_along_axis(came_from, memory[None], axis=0)[0]
        return memory + oldest.astype(jnp.int32) * paths.memories, state

    return lax.scan(step, last.astype(jnp.int32), came_from, reverse=True)[1]
