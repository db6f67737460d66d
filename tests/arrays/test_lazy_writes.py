"""Programs that update a quantized array leave one that holds what they wrote, within its bound."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from support.arrays import leaves_equal, multipliers, normal, quantized
from support.formats import FEW, FORMATS, WITH_LONG

import qpaged
from qpaged.implicit import use_implicit_args

ROW = normal(2, 1, 1, 32, seed=1) * 3
SOME = normal(2, 5, 32, seed=2) * 3


def update(at, array):
    return lax.dynamic_update_slice(array, ROW, (0, 3, at, 0))


WRITES = {
    "one slot": lambda a: update(5, a),
    "clamped past the end": lambda a: update(40, a),
    "clamped before the start": lambda a: lax.dynamic_update_slice(a, ROW, (0, -9, 3, 0)),
    "half a head": lambda a: lax.dynamic_update_slice(
        a, ROW[:1, :, :, :16].reshape(1, 1, 2, 8), (1, 3, 4, 7)
    ),
    "two unaligned pages": lambda a: lax.dynamic_update_slice_in_dim(a, normal(2, 2, 16, 32, seed=3), 3, 1),
    "everything": lambda a: lax.dynamic_update_slice(a, normal(2, 6, 16, 32, seed=4), (0, 0, 0, 0)),
    "rows, one page twice": lambda a: a.at[:, jnp.array([1, 2, 2, 9, -1]), jnp.array([1, 5, 6, 3, 4])].set(
        SOME, mode="drop"
    ),
    "a page": lambda a: a.at[1, 2].set(ROW[0, 0] * 2),
    "a box": lambda a: a.at[1, 2:4, 3:7, 5:9].set(3.0),
    "nothing": lambda a: a.at[:, jnp.zeros((0,), jnp.int32)].set(1.0),
    "vmapped update": lambda a: jax.vmap(lambda c, v, i: lax.dynamic_update_slice(c, v, (i, 0, 0)))(
        a, ROW, jnp.array([2, 4])
    ),
    "in a scan": lambda a: lax.scan(lambda c, i: (update(i, c), None), a, jnp.array([3, 9, 4]))[0],
    "a page copied": lambda a: a.at[:, 1].set(a[:, 3]),
    "pages copied": lambda a: a.at[:, jnp.array([0, 4])].set(a[:, jnp.array([5, 2])]),
}


PARTIAL = {"half a head", "a box"}
"""Writes of some channels only."""


def written_lazily(name, array):
    """Whether the write keeps the array quantized."""
    if name == "in a scan":
        return qpaged.implicit.provider().name != "qax"
    quantizer = array.quantizer
    blocks_grow = array.scales is None or (quantizer.growth is not None and array.global_scale is None)
    splits_channels = quantizer.transform is None and quantizer.bits == 8
    return name not in PARTIAL or (blocks_grow and splits_channels)


@pytest.mark.short(1)
@pytest.mark.parametrize("format", WITH_LONG)
def test_what_is_written_reads_back_within_the_bound(format):
    array = quantized(format)
    names = [name for name in WRITES if written_lazily(name, array)]

    @jax.jit
    def together(array):
        lazy = use_implicit_args(lambda a: {name: WRITES[name](a) for name in names})(array)
        dense = {name: WRITES[name](array.materialize()) for name in names}
        return {
            name: (lazy[name], lazy[name].dequantize(), dense[name], multipliers(lazy[name]))
            for name in names
        }

    for name, (lazy, got, want, factors) in together(array).items():
        assert isinstance(lazy, qpaged.QuantizedArray), name
        assert lazy.block == array.block and lazy.quantizer == array.quantizer, name
        # what was read back once is rounded anew where its block's scale grew: two bounds
        bound = 2 * np.asarray(array.quantizer.error_bound(want, factors))
        assert (np.abs(got - want) <= bound + 1e-30).all(), (name, float(jnp.abs(got - want).max()))


@pytest.mark.short(4)
@pytest.mark.parametrize("format", FORMATS)
def test_copied_pages_move_codes_and_scales(format):
    array = quantized(format)

    @jax.jit
    def copied(array):
        return use_implicit_args(lambda a: (WRITES["pages copied"](a), a[:, jnp.array([5, 2])]))(array)

    after, source = copied(array)
    for moved, taken in zip(jax.tree_util.tree_leaves(after), jax.tree_util.tree_leaves(source), strict=True):
        of_pages = moved if moved.shape[1] == array.shape[1] else np.repeat(moved, array.shape[1], axis=1)
        np.testing.assert_array_equal(np.asarray(of_pages)[:, [0, 4]], taken)


@pytest.mark.parametrize("format", FORMATS)
def test_moving_decodes_nothing(format):
    array = quantized(format)
    jaxpr = jax.make_jaxpr(use_implicit_args(WRITES["pages copied"]))(array)
    floats = [v.aval for eqn in jaxpr.eqns for v in eqn.outvars if jnp.issubdtype(v.aval.dtype, jnp.floating)]
    largest = 0 if array.scales is None else array.scales.size
    if array.quantizer.has_static_scales:  # what comes may be under others: rows are decoded, never the array
        largest = array.size // array.shape[1] * 2
    assert all(aval.size <= largest for aval in floats)


@pytest.mark.parametrize("format", FEW)
def test_a_row_written_twice_in_one_call_is_one_of_the_two(format):
    array = quantized(format)
    rows = jnp.stack([normal(2, 32, seed=5), 1000 * normal(2, 32, seed=6)], axis=1)
    slots = jnp.array([7, 7])
    write = jax.jit(use_implicit_args(lambda a: a.at[:, 2, slots].set(rows)))
    written = write(array)
    got, factors = written.dequantize()[:, 2, 7], multipliers(written)[:, 2, 7]
    errors = [np.abs(got - rows[:, i]) <= array.quantizer.error_bound(rows[:, i], factors) for i in (0, 1)]
    assert any(error.all() for error in errors)


def test_a_scaled_view_is_not_written_to():
    """Its scales are no longer the format's: a write to it materializes, warns, and is right."""
    view = use_implicit_args(lambda a: a * 2.0)(quantized("int8"))
    assert isinstance(view, qpaged.QuantizedArray)
    with pytest.warns(UserWarning, match="dynamic_update_slice"):
        out = use_implicit_args(lambda a: update(5, a))(view)
    np.testing.assert_array_equal(out, update(5, view.materialize()))


@pytest.mark.parametrize(("block", "shape"), [((1, 5), (4, 12)), ((1,), (4, 12)), ((0, 4), (4, 12))])
def test_a_block_must_tile_the_array(block, shape):
    with pytest.raises(ValueError, match="block must divide the array along every axis"):
        qpaged.arrays.quantize(jnp.zeros(shape), qpaged.get_quantizer("int8"), block)


def test_only_floats_are_quantized():
    with pytest.raises(TypeError, match="array must have a real floating-point dtype, but came as int32"):
        qpaged.get_quantizer("int8").quantize(jnp.zeros((4, 4), jnp.int32))
    with pytest.raises(ValueError, match=r"at least two axes, .* but came with shape \(4,\)"):
        qpaged.get_quantizer("int8").quantize(jnp.zeros(4))


@pytest.mark.parametrize("format", ["int8:token+offset", "int8+rotate", "nvfp4", "int4"])
@pytest.mark.parametrize("name", sorted(PARTIAL))
def test_blocks_that_must_be_written_whole(name, format):
    """A write of some channels materializes, warns, and is right; rows of them are refused."""
    array = quantized(format)
    with pytest.warns(UserWarning, match="materialized"):
        out = jax.jit(use_implicit_args(WRITES[name]))(array)
    np.testing.assert_array_equal(out, WRITES[name](array.materialize()))
    with pytest.raises(ValueError, match="array must be written in whole blocks, since scales of"):
        qpaged.arrays.write_rows(array, (3,), (jnp.array([0]),), jnp.zeros((1, 2, 6, 16)))


@pytest.mark.parametrize("format", ["int4:channel", "int4:channel+offset"])
def test_channels_one_by_one_share_bytes(format):
    """Where each channel has its scale, codes may be put into their bytes one at a time."""
    array = quantized(format)
    rows = normal(5, 2, 6, 16, seed=7)
    channels = jnp.array([4, 5, 30, 99, 7])
    written = jax.jit(qpaged.arrays.write_rows, static_argnums=1)(array, (3,), (channels,), rows)
    got = np.asarray(written.dequantize())
    want = np.array(array.dequantize())
    bound = np.asarray(array.quantizer.error_bound(want, multipliers(written)))
    for row, channel in zip(rows, channels, strict=True):
        if channel < 32:
            assert (np.abs(got[..., channel] - row) <= bound[..., channel] + 1e-30).all()
    others = np.delete(np.arange(32), [4, 5, 30, 7])
    np.testing.assert_array_equal(got[..., others], want[..., others])


def test_a_pytree_of_arrays_only():
    array = quantized("int8")
    leaves, tree = jax.tree_util.tree_flatten(array)
    assert len(leaves) == 2 and all(isinstance(leaf, jax.Array) for leaf in leaves)
    paths = [
        jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(quantized("nvfp4"))
    ]
    assert paths == [".codes", ".scales", ".outer"]  # as checkpoints of earlier versions name them
    assert leaves_equal(jax.tree_util.tree_unflatten(tree, leaves), array)
    assert array.nbytes == array.codes.nbytes + array.scales.nbytes
    sliced = jax.vmap(lambda a: a.dequantize(), in_axes=1)(array)
    np.testing.assert_array_equal(sliced, array.dequantize().swapaxes(0, 1))


@pytest.mark.short(1)
@pytest.mark.parametrize("format", ["int8:channel", "int4:channel", "int8:channel+offset"])
def test_a_channel_that_was_zero_beside_channels_that_grow(format):
    """A block of zeros may be one that nothing was written to; its scale comes with its first value."""
    array = qpaged.get_quantizer(format).empty((1, 2, 16, 32), jnp.float32)
    first = jnp.where(jnp.arange(32) == 5, 0.0, 1.0)
    rows = jnp.stack([first, jnp.full(32, 100.0)])[:, None]  # (2, 1, 32)
    write = jax.jit(qpaged.arrays.write_rows, static_argnums=1)
    for slot in (0, 1):
        array = write(array, (1, 2), (jnp.array([0]), jnp.array([slot])), rows[slot : slot + 1])
    got, factors = array.dequantize()[0, 0, :2], multipliers(array)[0, 0, :2]
    bound = array.quantizer.error_bound(rows[:, 0], factors)
    assert (np.abs(got - rows[:, 0]) <= bound + 1e-30).all()


def test_an_array_that_a_lazy_read_made_cannot_be_written_to():
    read = jax.jit(use_implicit_args(lambda array: array * 2))(quantized("int8:token"))
    message = "must be as int8:token stores it, but came as a lazy read of such an array; write to the array"
    for rows in (jnp.zeros((1, 2, 16, 32)), jax.tree_util.tree_map(lambda part: part[:, 0][None], read)):
        with pytest.raises(ValueError, match=message):
            qpaged.arrays.write_rows(read, (1,), (jnp.array([0]),), rows)


def test_arrays_compare_and_hash_by_identity():
    array = quantized("int8:token")
    assert array == array != quantized("int8:token") and len({array, array}) == 1
