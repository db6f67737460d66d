"""The kernel that writes to pages on TPUs, interpreted, against what XLA writes: bit for bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.arrays import leaves_equal, normal

import qpaged
from qpaged.arrays import _tpu_write, _writes, fill_lane_rows

TPU = qpaged.attention_backends()[0]
PAGES, PAGE_SIZE, HEADS = 12, 16, 2

pytestmark = pytest.mark.skipif(not TPU.available, reason=f"the tpu backend {TPU.reason}")


def write():
    """A new program, since what it is made of differs between the tests."""
    return jax.jit(
        lambda pool, pages, slots, rows: qpaged.arrays.write_rows(pool, (1, 2), (pages, slots), rows)
    )


# Some rows to one page, two to one slot, some nowhere; more rows to a page than come along at once.
PLACES = np.array(
    [(3, 0), (3, 5), (3, 5), (7, 15), (0, 2), (-1, 3), (12, 3), (5, 16)]
    + [(9, slot) for slot in (1, 9, 3, 14, 2, 0, 7, 8, 15, 4)],
    np.int32,
)


@pytest.mark.parametrize(
    ("format", "head_dim"),
    [
        ("int8", 128),
        pytest.param("int8:channel", 64, marks=pytest.mark.long),
        pytest.param("int8:channel+offset", 128, marks=pytest.mark.long),
        pytest.param("int4:channel", 128, marks=pytest.mark.long),
        pytest.param("fp8_e4m3", 64, marks=pytest.mark.long),
        pytest.param("int8:token", 128, marks=pytest.mark.long),
        ("int4", 64),
        pytest.param("int2", 128, marks=pytest.mark.long),
        pytest.param("nvfp4", 128, marks=pytest.mark.long),
        ("int6:channel", 128),
        pytest.param("int5", 256, marks=pytest.mark.long),
        pytest.param("int3:page", 256, marks=pytest.mark.long),
        ("raw", 64),
    ],
)
def test_the_same_bits(format, head_dim, monkeypatch):
    from jax.experimental.pallas import tpu as pltpu

    shape = (HEADS, PAGES, PAGE_SIZE, head_dim)
    pool = fill_lane_rows(qpaged.get_quantizer(format).empty(shape, jnp.float32))
    first, second = (normal(len(PLACES), HEADS, head_dim, seed=seed, scale=seed) for seed in (1, 9))
    other = PLACES[::-1] * np.array([[1, -1]], np.int32) + np.array([[0, 15]], np.int32)

    def twice(program):
        written = program(pool, *PLACES.T, first)
        return program(written, *other.T, second)  # larger values, so that scales grow

    want = twice(write())
    assert not leaves_equal(want, pool)
    monkeypatch.setattr(_writes, "by_platform", lambda *arguments, tpu, **_: tpu(*arguments))
    with pltpu.force_tpu_interpret_mode():
        assert leaves_equal(twice(write()), want)


def test_the_same_scales_of_slots():
    scales = normal(HEADS, PAGES, PAGE_SIZE, 2)
    places = np.unique(PLACES, axis=0)
    slots = normal(len(places), HEADS, 2, seed=3)
    on_tpu = _tpu_write.scatter_slot_scales(scales, places, slots)
    assert leaves_equal(on_tpu, _writes._scatter_scales(scales, places, slots))
    assert not leaves_equal(on_tpu, scales)


@pytest.mark.parametrize("format", ["int8", "raw"])
def test_the_platform_of_the_program_decides(format):
    pool = jax.eval_shape(lambda: qpaged.get_quantizer(format).empty((2, 12, 16, 128), jnp.float32))
    arguments = (
        *(jax.ShapeDtypeStruct((3,), jnp.int32),) * 2,
        jax.ShapeDtypeStruct((3, 2, 128), jnp.float32),
    )
    layers = jax.tree_util.tree_map(lambda x: jax.ShapeDtypeStruct((5, *x.shape), x.dtype), pool)
    each = jax.jit(jax.vmap(write(), in_axes=(0, None, None, None)))  # which Pallas cannot do
    for program, pools, platform, kernels in (
        (write(), pool, "tpu", 1), (write(), pool, "cpu", 0), (each, layers, "tpu", 0)
    ):  # fmt: skip
        lowered = program.trace(pools, *arguments).lower(lowering_platforms=(platform,))
        assert lowered.as_text().count("@tpu_custom_call") == kernels


def test_more_rows_than_scalar_memory_holds_are_left_to_xla(monkeypatch):
    pool = qpaged.get_quantizer("raw").empty((2, 4, 16, 128), jnp.float32)
    assert _tpu_write.takes(pool, (1, 2), 3)
    monkeypatch.setattr(_tpu_write, "MOST_ROWS", 2)
    assert not _tpu_write.takes(pool, (1, 2), 3)


def test_scales_have_gradients():
    """The kernel has none, but it writes codes alone."""
    pool = qpaged.get_quantizer("int8:token").empty((2, 4, 16, 8), jnp.float32)
    index, rows = jnp.array([1]), jnp.ones((1, 2, 8))

    def total(scales):
        ones = pool.like(pool.codes + jnp.int8(1), pool.parts._replace(scales=scales))
        return qpaged.arrays.write_rows(ones, (1, 2), (index, index), rows).dequantize().sum()

    gradient = jax.jit(jax.grad(total))(pool.scales)
    np.testing.assert_array_equal(gradient[:, 1, 1], 0)  # of what was overwritten
    np.testing.assert_array_equal(gradient.sum(), (2 * 4 * 16 - 2) * 8)
