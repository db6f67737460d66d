"""Rows that programs write by arithmetic over a whole axis go through the same writes as indexed ones."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from support.arrays import normal
from support.implicit_arrays import needs_own_implementation
from support.long import first_short

import qpaged
from qpaged.arrays import empty, is_quantized, quantize
from qpaged.implicit import use_implicit_args

pytestmark = [needs_own_implementation, pytest.mark.filterwarnings("error")]
FORMATS = ("int8", "int8:token", "int8+offset", "int4:token+rotate", "int4:channel", "raw")
SHAPE = (3, 32, 2, 64)
NEW = normal(3, 1, 2, 64, seed=1)
PER_SEQUENCE = jnp.array([4, 31, 0])


def filled(spelling):
    """Return an array with the first half of its length written."""
    quantizer = qpaged.get_quantizer(spelling)
    page, channels = quantizer.block((16, SHAPE[-1]))
    array = empty(SHAPE, quantizer, (1, page, 1, channels), jnp.float32)
    write = use_implicit_args(lambda array, rows: array.at[:, :16].set(rows))
    return write(array, normal(3, 16, 2, 64, seed=2))


def one_hot(position, dtype=bool):
    """Return (1 or sequences, length, 1, 1)."""
    return (jnp.arange(32) == jnp.reshape(position, (-1, 1)))[:, :, None, None].astype(dtype)


@jax.jit
@use_implicit_args
def by_index(array, position):
    sequences = jnp.arange(3)
    return array.at[sequences, jnp.broadcast_to(position, (3,))].set(NEW[:, 0], mode="drop")


WAYS = {
    "where": lambda array, position: jnp.where(one_hot(position), NEW, array),
    "where not": lambda array, position: jnp.where(~one_hot(position), array, NEW),
    "where, stretched": lambda array, position: jnp.where(
        jnp.broadcast_to(one_hot(position), SHAPE), jnp.broadcast_to(NEW, SHAPE), array
    ),
    "where, of more rows": lambda array, position: jnp.where(
        one_hot(position), normal(*SHAPE) * 0 + NEW, array
    ),
    "where both": lambda array, position: jnp.where(one_hot(position) & (NEW[:, :, :1, :1] < 99), NEW, array),
    "unlike": lambda array, position: jnp.where(
        (jnp.arange(32) != jnp.reshape(position, (-1, 1)))[:, :, None, None], array, NEW
    ),
}
SUMS = {
    "one_hot": lambda array, position: (
        array + jax.nn.one_hot(jnp.reshape(position, (-1,)), 32)[:, :, None, None] * NEW
    ),
    "mixed": lambda array, position: (
        array * (1 - one_hot(position, jnp.float32)) + NEW * one_hot(position, jnp.float32)
    ),
    "at add": lambda array, position: array.at[jnp.arange(3), jnp.broadcast_to(position, (3,))].add(
        NEW[:, 0], mode="drop"
    ),
    "where zero": lambda array, position: array + jnp.where(one_hot(position), NEW, 0),
    "by another's one-hot": lambda array, position: (
        array
        + jax.jit(lambda _, mask, row: mask * row)(
            one_hot(3, jnp.float32), one_hot(position, jnp.float32), NEW
        )
    ),
    "converted": lambda array, position: (
        array + (one_hot(position, jnp.bfloat16) * jnp.bfloat16(1)).astype(jnp.float32) * NEW
    ),
}
POSITIONS = {"one": jnp.int32(20), "per sequence": PER_SEQUENCE, "past the end": jnp.int32(32)}


def assert_same_arrays(got, want):
    assert is_quantized(got)
    for a, b in zip(*map(jax.tree_util.tree_leaves, (got, want)), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.short(3)
@pytest.mark.parametrize("spelling", first_short(1, FORMATS))
@pytest.mark.parametrize("way", WAYS)
def test_a_selected_row_is_written_as_by_an_index(way, spelling):
    array = filled(spelling)
    got = jax.jit(use_implicit_args(WAYS[way]))
    for position in (POSITIONS["one"], PER_SEQUENCE, POSITIONS["past the end"]):
        assert_same_arrays(got(array, position), by_index(array, position))


@pytest.mark.parametrize("spelling", first_short(1, ["int8:token", "int4:token+rotate", "raw"]))
@pytest.mark.parametrize("way", SUMS)
def test_a_row_that_is_added_to_zeros_is_written_as_by_an_index(way, spelling):
    array = filled(spelling)
    got = jax.jit(use_implicit_args(SUMS[way]))
    for position in (jnp.int32(20), jnp.array([16, 31, 32])):
        assert_same_arrays(got(array, position), by_index(array, position))


@pytest.mark.short(1)
@pytest.mark.parametrize("spelling", ["int8:token", "int8"])
def test_a_row_is_added_to_what_lies_there(spelling):
    array = filled(spelling)
    got = use_implicit_args(SUMS["one_hot"])(array, jnp.int32(5))
    want = array.dequantize().at[:, 5].add(NEW[:, 0])
    np.testing.assert_allclose(got.dequantize(), want, atol=float(got.multipliers().max()))


def test_rows_that_are_added_to_one_place_are_all_added():
    array = filled("int8:token")
    rows = normal(4, 3, 2, 64, seed=3)
    add = use_implicit_args(
        lambda array: array.at[:, jnp.array([20, 21, 20, 40])].add(jnp.moveaxis(rows, 0, 1))
    )
    want = array.dequantize().at[:, 20].add(rows[0] + rows[2]).at[:, 21].add(rows[1])
    np.testing.assert_allclose(add(array).dequantize(), want, atol=float(add(array).multipliers().max()))


NEAR_MISSES = {
    "several rows": lambda array, p: jnp.where((jnp.arange(32) <= p)[None, :, None, None], NEW, array),
    "a list of indices": lambda array, p: jnp.where(
        (jnp.arange(32) == jnp.arange(32)[::-1])[None, :, None, None], NEW, array
    ),
    "two and a row": lambda array, p: array * (2 - one_hot(p, jnp.float32)) + NEW,
    "any row": lambda array, p: array + NEW,
    "one but for a row": lambda array, p: array + (1 - NEW * one_hot(p, jnp.float32)),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_other_arithmetic_has_its_own_values(name):
    array = filled("int8:token")
    with pytest.warns(qpaged.implicit.MaterializeWarning):
        got = use_implicit_args(NEAR_MISSES[name])(array, jnp.int32(5))
    np.testing.assert_allclose(got, NEAR_MISSES[name](array.dequantize(), jnp.int32(5)), rtol=1e-6)


def assert_same_values(function, array):
    """Check a function of a quantized array, which may be materialized, against that of its values."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", qpaged.implicit.MaterializeWarning)
        got = use_implicit_args(function)(array)
    values = got.dequantize() if is_quantized(got) else got
    np.testing.assert_allclose(values, function(array.dequantize()), atol=0.02)


def index_of(axis, index, shape=SHAPE, dtype=bool):
    """Return True or 1 at one index of an axis, 1 long along the others."""
    lengths = [length if other == axis else 1 for other, length in enumerate(shape)]
    return (lax.broadcasted_iota(jnp.int32, lengths, axis) == index).astype(dtype)


def transposed(mask):
    """Return a mask of four by four with its first two axes in the other order, by a reshape."""
    return lax.reshape(jnp.broadcast_to(mask, (4, 4, 1, 1)), (4, 4, 1, 1), (1, 0, 2, 3))


FIRST = jnp.array([True, False, False]).reshape(3, 1, 1, 1)
MASKS = {
    "stretched before it meets another": lambda a: jnp.where(
        jnp.broadcast_to(index_of(1, 20), SHAPE) & jnp.broadcast_to(FIRST, SHAPE), NEW, a
    ),
    "of one index, stretched by another": lambda a: jnp.where(index_of(0, 0, (1,) * 4) & ~FIRST, NEW, a),
    "of one index, stretched by the array": lambda a: a + jnp.where(index_of(1, 0, (3, 1, 1, 1)), NEW, 0),
    "of a row, times one of sequences": lambda a: (
        a + index_of(1, 5, dtype=jnp.float32) * NEW * index_of(0, 2, dtype=jnp.float32)
    ),
    "beside one of another axis in a jit": lambda a: (
        a
        + jax.jit(lambda _, mask, row: mask * row)(
            index_of(0, 2, dtype=jnp.float32), index_of(1, 5, dtype=jnp.float32), NEW
        )
    ),
    "beside one of fewer axes in a jit": lambda a: (
        a
        + jax.jit(lambda _, mask, row: mask * row)(
            jax.nn.one_hot(2, 32), index_of(1, 5, dtype=jnp.float32), NEW
        )
    ),
    "of integers, inverted bit by bit": lambda a: a * (~one_hot(5, jnp.int32)).astype(jnp.float32),
}
SQUARE = (4, 4, 2, 64)
OTHER_SHAPES = {
    "a reshape that transposes a mask": (
        SQUARE,
        lambda a: jnp.where(transposed(index_of(1, 1, SQUARE)) & True, NEW[:1], a),
    ),
    "a reshape that transposes what repeats": (
        SQUARE,
        lambda a: jnp.where(transposed(jnp.arange(4).reshape(1, 4, 1, 1) < 2), a, 0),
    ),
    "an array that a row stretches": ((1, 32, 2, 64), lambda a: a + one_hot(5, jnp.float32) * NEW),
    "an array that a factor stretches": (
        (1, 32, 2, 64),
        lambda a: a * (1 - one_hot(PER_SEQUENCE, jnp.float32)),
    ),
    "heads that weights stretch": ((3, 32, 1, 64), lambda a: a * jnp.arange(3.0).reshape(1, 1, 3, 1)),
    "no sequences": (
        (0, 32, 2, 64),
        lambda a: a * (1 - one_hot(5, jnp.float32)) + one_hot(5, jnp.float32) * NEW[:1],
    ),
    "no length": ((3, 0, 2, 64), lambda a: a + index_of(1, 5, (3, 0, 2, 64), jnp.float32) * NEW),
}


@pytest.mark.parametrize("name", MASKS)
def test_a_mask(name):
    """Rows go where it says, and nowhere else."""
    assert_same_values(MASKS[name], filled("int8:token"))


@pytest.mark.parametrize("name", OTHER_SHAPES)
def test_of_other_shapes(name):
    shape, function = OTHER_SHAPES[name]
    array = empty(shape, qpaged.get_quantizer("int8:token"), (1, 1, 1, shape[-1]), jnp.float32)
    if array.size:
        array = quantize(normal(*shape), array.quantizer, array.block)
    assert_same_values(function, array)


@pytest.mark.short(2)
@pytest.mark.parametrize(
    ("dtype", "length", "index"), [("bfloat16", 2048, 1000), ("float8_e3m4", 32, 31), ("uint8", 300, 5)]
)
def test_numbers_that_a_dtype_does_not_tell_apart_are_no_index(dtype, length, index):
    """In bfloat16, 1,000 and its neighbours are one number, so that several rows are written."""
    if not hasattr(jnp, dtype):
        pytest.skip(f"this JAX has no {dtype}")
    quantizer = qpaged.get_quantizer("int8:token")
    array = empty((1, length, 1, 8), quantizer, (1, 1, 1, 8), jnp.float32)

    def write(array):
        slots = jnp.arange(length).astype(dtype)
        at_index = slots == jnp.asarray(index).astype(dtype)
        return jnp.where(at_index[None, :, None, None], jnp.float32(1), array)

    with pytest.warns(qpaged.implicit.MaterializeWarning):
        got = use_implicit_args(write)(array)
    np.testing.assert_array_equal(got, write(array.dequantize()))
    assert int((got != 0).all(axis=(0, 2, 3)).sum()) > 1
