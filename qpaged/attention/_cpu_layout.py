"""How a call is told to the kernel of the ``cpu`` backend: the structures of ``cpu/kernel.h``, filled in."""

import ctypes
import enum
import functools
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax import lax
from jax.typing import DTypeLike

from qpaged._compat import outside_of_meshes
from qpaged.arrays import ArrayFormat, windows
from qpaged.pools import Pages, as_quantized


class Element(enum.IntEnum):
    """How the elements of pages are stored; ``enum Element``."""

    FLOAT32 = 0
    BFLOAT16 = 1
    EVEN_CODES = 2
    TABLE_CODES = 3


class Number(enum.IntEnum):
    """How the factors or the offsets of blocks are stored; ``enum Number``."""

    ABSENT = 0
    FLOAT32 = 1
    BFLOAT16 = 2
    LOW_HALF = 3
    HIGH_HALF = 4
    BYTE = 5
    WORD = 6


class Blocks(ctypes.Structure):
    """``struct Blocks``."""

    _fields_ = (
        ("number", ctypes.c_int32),
        ("groups", ctypes.c_int32),
        ("head_stride", ctypes.c_int64),
        ("page_stride", ctypes.c_int64),
        ("slot_stride", ctypes.c_int64),
    )


class PoolLayout(ctypes.Structure):
    """``struct PoolLayout``."""

    _fields_ = (
        ("element", ctypes.c_int32),
        ("bits", ctypes.c_int32),
        ("sign_bit", ctypes.c_int32),
        ("step", ctypes.c_float),
        ("start", ctypes.c_float),
        ("has_map", ctypes.c_int32),
        ("map", ctypes.c_int8 * 16),
        ("state_bits", ctypes.c_int32),
        ("low_window", ctypes.c_int32),
        ("scales", Blocks),
        ("offsets", Blocks),
        ("global_scales", Blocks),
    )


class CallLayout(ctypes.Structure):
    """``struct CallLayout``."""

    _fields_ = (
        ("rows", ctypes.c_int32),
        ("q_heads", ctypes.c_int32),
        ("kv_heads", ctypes.c_int32),
        ("head_dim", ctypes.c_int32),
        ("table_pages", ctypes.c_int32),
        ("page_size", ctypes.c_int32),
        ("num_pages", ctypes.c_int32),
        ("window", ctypes.c_int32),
        ("soft_cap", ctypes.c_float),
        ("keys", PoolLayout),
        ("values", PoolLayout),
    )

    def as_array(self) -> np.ndarray:
        """Return the structure's bytes."""
        return np.frombuffer(bytes(self), np.uint8)


class Codes(NamedTuple):
    """What the codes of a format stand for.

    Attributes:
        element: EVEN_CODES or TABLE_CODES.
        sign_bit: of packed codes; 0 if they have no sign.
        step: between the values of codes that follow one another.
        start: the value of code 0.
        map: what codes are in steps, by their bits, where that is not the code itself; None if it is.
        values: of all codes, by their bits; None for EVEN_CODES. Of a trellis, of all states, in steps.
    """

    element: Element
    sign_bit: int
    step: float
    start: float
    map: np.ndarray | None = None
    values: np.ndarray | None = None


class Scales(NamedTuple):
    """How the numbers of a format's blocks are stored; None for what is stored in no way that is read.

    Attributes:
        factors: in its scales.
        offsets: in the same words.
        global_scales: in its second-level scales.
    """

    factors: Number | None
    offsets: Number | None
    global_scales: Number | None


Method: TypeAlias = Callable[[jax.Array], jax.Array]
"""Of a format: reads numbers, elementwise."""

PLAIN = {np.dtype(jnp.bfloat16): Element.BFLOAT16, np.dtype(jnp.float32): Element.FLOAT32}
"""Plain elements, by dtype."""

MOST_STATE_BITS = 12  # MOST_STATES
MAPPED_BITS = 4  # of codes that the kernel looks up within a register
NOTHING = np.zeros(1, np.float32)  # in place of an operand that a pool does not have


def call_layout_of(rows: int, q_heads: int, table_pages: int, keys: Pages, values: Pages) -> CallLayout:
    """Return the layout of a call, but for its options."""
    kv_heads, num_pages, page_size, head_dim = keys.shape
    return CallLayout(
        rows=rows,
        q_heads=q_heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        table_pages=table_pages,
        page_size=page_size,
        num_pages=num_pages,
        keys=_pool_layout(keys),
        values=_pool_layout(values),
    )


def _pool_layout(pool: Pages) -> PoolLayout:
    quantized = as_quantized(pool)
    if quantized is None:
        return PoolLayout(element=PLAIN[np.dtype(pool.dtype)])
    quantizer = quantized.quantizer
    if quantized.scales is None:
        element = element_of_bits(quantizer, quantized.dtype)
        assert element is not None  # call_refusal says so
        return PoolLayout(element=element)
    codes = codes_of(quantizer, quantized.dtype)
    assert codes is not None  # call_refusal says so
    layout = PoolLayout(
        element=codes.element,
        bits=quantizer.bits,
        sign_bit=codes.sign_bit,
        step=codes.step,
        start=codes.start,
    )
    if codes.map is not None:
        layout.has_map = True
        layout.map[:] = codes.map
    if quantizer.state_bits is not None:
        layout.state_bits = quantizer.state_bits
        layout.low_window = windows(quantizer.bits, quantizer.state_bits)[0]
    scales = scales_of(quantizer)
    layout.scales = _blocks(scales.factors, quantized.scales)
    layout.offsets = _blocks(scales.offsets, quantized.scales)
    if quantized.global_scale is not None:
        layout.global_scales = _blocks(scales.global_scales, quantized.global_scale)
    return layout


def _blocks(number: Number | None, scales: jax.Array) -> Blocks:
    """Return how numbers (kv_heads, pages, slots, groups) are stored, one of some axes for all."""
    assert number is not None  # call_refusal says so
    heads, pages, slots, groups = scales.shape
    return Blocks(
        number=number,
        groups=groups,
        head_stride=pages * slots * groups if heads > 1 else 0,
        page_stride=slots * groups if pages > 1 else 0,
        slot_stride=groups if slots > 1 else 0,
    )


def pool_operands(pool: Pages) -> tuple[jax.Array | np.ndarray, ...]:
    """Return a pool's arrays and the tables that read them, in the order of ``enum PoolOperand``."""
    quantized = as_quantized(pool)
    if quantized is None:
        assert isinstance(pool, jax.Array)  # call_refusal says so
        return pool, *[NOTHING] * 6
    quantizer, elements, scales = quantized.quantizer, quantized.stored, quantized.scales
    if scales is None:
        return elements, *[NOTHING] * 6
    numbers, global_scale = scales_of(quantizer), quantized.global_scale
    codes = codes_of(quantizer, quantized.dtype)
    assert codes is not None  # call_refusal says so
    offset = None if quantizer.offset is None else quantizer.offset.from_scales
    second = None if quantizer.global_scale is None else quantizer.global_scale.multiplier
    return (
        elements,
        NOTHING if codes.values is None else codes.values,
        scales,
        NOTHING if global_scale is None else global_scale,
        _table(numbers.factors, quantizer.multiplier, scales.dtype),
        _table(numbers.offsets, offset, scales.dtype),
        NOTHING if global_scale is None else _table(numbers.global_scales, second, global_scale.dtype),
    )


def _table(number: Number | None, method: Method | None, dtype: DTypeLike) -> jax.Array | np.ndarray:
    """Return what all bytes or words stand for, computed by the program itself: no constant in it."""
    if number not in (Number.BYTE, Number.WORD):
        return NOTHING
    assert method is not None
    bits = lax.iota(jnp.uint8 if number == Number.BYTE else jnp.uint16, 2 ** (8 * np.dtype(dtype).itemsize))
    return method(lax.bitcast_convert_type(bits, dtype)).astype(jnp.float32)


@functools.lru_cache(maxsize=256)
def codes_of(quantizer: ArrayFormat, dtype: DTypeLike) -> Codes | None:
    """Return what the codes of at most 8 bits stand for, in an array of logical ``dtype``.

    None if that does not depend on the code alone.
    """
    if quantizer.state_bits is not None:
        return _states_of(quantizer)
    bits = quantizer.bits
    code_dtype = np.dtype(quantizer.code_dtype(dtype))
    values = _evaluate(lambda codes: quantizer.decode(codes, jnp.float32), _all_codes(bits, code_dtype))
    if values is None:
        return None
    codes = _all_codes(bits, code_dtype).view(np.int8 if _is_signed(code_dtype) or bits == 8 else np.uint8)
    sign_bit = 1 << (bits - 1) if _is_signed(code_dtype) and bits < 8 else 0
    number = codes.astype(int)  # as the kernel reads the code
    step, start = values[number == 1][0] - values[number == 0][0], values[number == 0][0]
    if (number * step + start == values).all():
        return Codes(Element.EVEN_CODES, sign_bit, float(step), float(start))
    step = np.abs(values[values != 0]).min()
    if bits <= MAPPED_BITS and (np.abs(values / step) <= 127).all() and (values % step == 0).all():
        in_steps = np.zeros(16, np.int8)
        in_steps[: len(values)] = values / step
        return Codes(Element.EVEN_CODES, sign_bit, float(step), 0.0, map=in_steps)
    return Codes(Element.TABLE_CODES, 0, 1.0, 0.0, values=values)


def _states_of(quantizer: ArrayFormat) -> Codes | None:
    """Return what the states of a trellis stand for; None if these are not so many steps of 8 bits."""
    assert quantizer.state_bits is not None
    states = np.arange(2**quantizer.state_bits, dtype=np.int32)
    values = _evaluate(lambda states: quantizer.decode(states, jnp.float32), states)
    if values is None or not values.any() or quantizer.state_bits > MOST_STATE_BITS:
        return None
    step = np.abs(values[values != 0]).min()
    in_steps = values / step
    if (in_steps != np.clip(np.round(in_steps), -128, 127)).any():
        return None
    return Codes(Element.EVEN_CODES, 0, float(step), 0.0, values=in_steps)


def _is_signed(code_dtype: np.dtype) -> bool:
    return np.issubdtype(code_dtype, np.signedinteger)


def _all_codes(bits: int, code_dtype: np.dtype) -> np.ndarray:
    """Return all codes, by their bits, as elements of ``code_dtype``."""
    codes = np.arange(2**bits).astype(np.uint8)
    if _is_signed(code_dtype):
        return (codes << (8 - bits)).astype(np.uint8).view(np.int8) >> (8 - bits)
    return codes.view(code_dtype)


@functools.lru_cache(maxsize=256)
def scales_of(quantizer: ArrayFormat) -> Scales:
    """Return how the numbers of a format's blocks are stored."""
    factors = _number_of(quantizer.multiplier, quantizer.scale_dtype)
    offsets: Number | None = Number.ABSENT
    global_scales: Number | None = Number.ABSENT
    if quantizer.offset is not None:
        offsets = _number_of(quantizer.offset.from_scales, quantizer.scale_dtype)
    if quantizer.global_scale is not None:
        global_scales = _number_of(quantizer.global_scale.multiplier, quantizer.global_scale.dtype)
    return Scales(factors, offsets, global_scales)


def _number_of(method: Method, dtype: DTypeLike | None) -> Number | None:
    """Return how a number is stored that ``method`` reads from ``dtype``; None if in no way that is known.

    All that 16 bits can be is asked of it; of 32 bits, as many.
    """
    dtype = np.dtype(dtype)
    if dtype.itemsize == 1:
        all_bytes = np.arange(2**8, dtype=np.uint8).view(dtype)
        return None if _evaluate(method, all_bytes) is None else Number.BYTE
    if dtype.itemsize > 4:
        return None
    words = _words_of(dtype.itemsize)
    read = _evaluate(method, words.view(dtype))
    if read is None:
        return None
    if dtype.itemsize == 2:
        return Number.BFLOAT16 if _same(read, words.view(ml_dtypes.bfloat16)) else Number.WORD
    halves = words.view(ml_dtypes.bfloat16).reshape(-1, 2)
    candidates = {
        Number.FLOAT32: words.view(np.float32),
        Number.LOW_HALF: halves[:, 0],
        Number.HIGH_HALF: halves[:, 1],
    }
    return next((number for number, expected in candidates.items() if _same(read, expected)), None)


def _same(a: np.ndarray | None, b: np.ndarray) -> bool:
    return a is not None and np.array_equal(a, b.astype(np.float32), equal_nan=True)


def _evaluate(method: Method, numbers: np.ndarray) -> np.ndarray | None:
    """Return ``method(numbers)`` in float32, also while a program is traced; None if it is not elementwise.

    It is taken to be if the same numbers in another order and shape give the same.
    """
    order = np.random.default_rng(0).permutation(len(numbers))
    with outside_of_meshes():
        read = np.asarray(method(jnp.asarray(numbers)), np.float32)
        read_again = np.asarray(method(jnp.asarray(numbers[order].reshape(2, -1))), np.float32)
    is_elementwise = read_again.size == read.size and _same(read_again.reshape(-1), read[order])
    return read if is_elementwise else None


@functools.lru_cache(maxsize=256)
def element_of_bits(quantizer: ArrayFormat, dtype: DTypeLike) -> Element | None:
    """Return how numbers are stored whose codes are their own bits; None if they are not."""
    code_dtype = np.dtype(quantizer.code_dtype(dtype))
    if np.dtype(dtype) not in PLAIN or code_dtype.itemsize != np.dtype(dtype).itemsize:
        return None
    words = _words_of(code_dtype.itemsize)
    read = _evaluate(lambda codes: quantizer.decode(codes, dtype), words.view(code_dtype))
    return PLAIN[np.dtype(dtype)] if _same(read, words.view(np.dtype(dtype))) else None


def _words_of(itemsize: int) -> np.ndarray:
    """Return all words of 16 bits; as many of 32, whose halves are in two orders."""
    words = np.arange(2**16, dtype=np.uint16)
    if itemsize == 2:
        return words
    return np.stack([words * np.uint16(40503), words], axis=1).view(np.uint32).reshape(-1)
