"""The order in which TPUs keep the scales of slots: every scale is found where it is said to be."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qpaged.arrays import _pages
from qpaged.arrays._tpu_scales import ScaleOrder
from qpaged.arrays._tpu_write import scatter_slot_scales

SHAPES = [(2, 256, 16, 1), (2, 128, 16, 4), (1, 256, 16, 8), (3, 128, 4, 16), (2, 96, 16, 1), (2, 7, 16, 4)]


@pytest.mark.parametrize("dtype", [jnp.uint8, jnp.uint16, jnp.float32])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_scale_is_found(shape, dtype):
    scales = jnp.asarray(np.random.default_rng(0).integers(0, 256, shape), dtype)
    order = ScaleOrder.of(scales)
    indices = [index.astype(np.int32) for index in np.ogrid[tuple(slice(n) for n in shape)]]

    @jax.jit
    def run(scales, indices):
        flat = order.flatten(scales)
        return flat, order.flat_index(*indices), order.unflatten(flat)

    flat, at, unflattened = map(np.asarray, run(scales, indices))
    np.testing.assert_array_equal(np.sort(at.ravel()), np.arange(scales.size))
    np.testing.assert_array_equal(flat[at], scales)
    np.testing.assert_array_equal(unflattened, scales)


def test_pages_fill_lanes_and_narrow_scales_share_tiles():
    rows = {
        (groups, dtype): ScaleOrder.of(jnp.zeros((2, 256, 16, groups), dtype)).tile_rows
        for groups in (1, 4, 16)
        for dtype in (jnp.uint16, jnp.float32)
    }
    assert rows == {
        (1, jnp.uint16): 8, (1, jnp.float32): 1, (4, jnp.uint16): 4, (4, jnp.float32): 4,
        (16, jnp.uint16): 8, (16, jnp.float32): 8,
    }  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
def test_scales_are_put_where_they_belong(shape):
    heads, pages, slots, groups = shape
    rng = np.random.default_rng(1)
    scales = rng.integers(0, 2**16, shape).astype(np.uint16)
    places = np.array([[0, 0], [pages - 1, slots - 1], [3, 2], [pages, 0], [-1, 1], [1, slots]])
    new = rng.integers(0, 2**16, (len(places), heads, groups)).astype(np.uint16)
    want = scales.copy()
    for (page, slot), put in zip(places[:3], new, strict=False):  # the others are out of range
        want[:, page, slot] = put
    written = jax.jit(scatter_slot_scales)(scales, places.astype(np.int32), new)
    np.testing.assert_array_equal(written, want)


@pytest.mark.parametrize("shape", [*SHAPES, (2, 256, 1, 1), (2, 128, 1, 16)])
def test_scales_of_pages_are_cleared_and_copied_as_elsewhere(shape):
    scales = jnp.asarray(np.random.default_rng(2).integers(1, 256, shape), jnp.uint8)
    pages = jnp.array([0, shape[1] - 1, 3, shape[1], -1], jnp.int32)
    targets = jnp.array([1, 4, 2, 0, 5], jnp.int32)

    @jax.jit
    def run(scales, pages, targets):
        targets = _pages.final_targets(pages, targets, shape[1])
        cleared = _pages._clear(scales, pages), _pages._clear_on_tpu(scales, pages)
        copied = _pages._copy(scales, pages, targets), _pages._copy_on_tpu(scales, pages, targets)
        return cleared, copied

    (cleared, cleared_on_tpu), (copied, copied_on_tpu) = run(scales, pages, targets)
    np.testing.assert_array_equal(cleared_on_tpu, cleared)
    assert not np.asarray(cleared)[:, 3].any() and np.asarray(cleared)[:, 2].all()
    np.testing.assert_array_equal(copied_on_tpu, copied)
    np.testing.assert_array_equal(np.asarray(copied)[:, 4], np.asarray(scales)[:, -1])
