"""Programs that read a quantized array give what they give on its values, and decode nothing to do so."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from support.arrays import normal, quantized
from support.formats import FORMATS, WITH_LONG
from support.implicit_arrays import needs_own_implementation

import qpaged
from qpaged.arrays._joined import Joined
from qpaged.arrays._repeated import Repeated
from qpaged.implicit import ImplicitArray, MaterializeWarning, materialize_nested, use_implicit_args

SCALED = [format for format in FORMATS if format != "raw"]

MOVES = {
    "transpose": lambda a: a.transpose(2, 0, 3, 1),
    "slice": lambda a: a[:, 1:3, 4:8, ::2],
    "slice within a block": lambda a: a[0, :, 3:14, 8:],
    "one element": lambda a: a[1:, 5, 15],
    "strided": lambda a: a[:, ::2, ::3],
    "empty slice": lambda a: a[:, 2:2],
    "take": lambda a: a[:, jnp.array([3, 1, 1, 5])],
    "take pages and slots": lambda a: a[:, jnp.array([[3, 1], [1, 5]]), jnp.array([[0, 7], [15, 3]])],
    "take from the end": lambda a: a[:, jnp.array([-1, 2])],
    "fill": lambda a: a.at[:, jnp.array([0, 6, -7, 5])].get(mode="fill"),
    "fill with zeros": lambda a: a.at[:, jnp.array([0, 6, -7, 5])].get(mode="fill", fill_value=0),
    "clip": lambda a: a.at[:, jnp.array([0, 6, 9, 5])].get(mode="clip"),
    "batched take": lambda a: jax.vmap(lambda page, i: page[i])(
        a.swapaxes(0, 1), jnp.array([0, 1, 1, 0, 1, 0])
    ),
    "broadcast": lambda a: jnp.broadcast_to(a[:, :, None], (2, 6, 3, 16, 32)),
    "concatenate": lambda a: jnp.concatenate([a, a[:, :2], a[:, 3:4]], 1),
    "concatenate slots": lambda a: jnp.concatenate([a, a[:, :, 3:4]], 2),
    "tile": lambda a: jnp.tile(a, (2, 1, 3, 1)),
    "a part of a split": lambda a: jnp.split(a, (1, 4), 1)[1],
    "a part of slots": lambda a: jnp.split(a, (3, 11), 2)[1],
    "stack": lambda a: jnp.stack([a, a], 1),
    "squeeze": lambda a: a[:1].squeeze(0),
    "expand": lambda a: a[:, None, ..., None],
    "convert": lambda a: a.astype(jnp.float16),
    "select": lambda a: lax.select_n(jnp.array(True), a[:, :2], a[:, 2:4]),
    "copy": lambda a: jnp.array(a, copy=True),
} | {
    f"reshape to {shape}": functools.partial(lambda shape, a: a.reshape(shape), shape)
    for shape in [
        (2, 96, 32), (12, 16, 32), (2, 6, 512), (6144,), (2, 6, 4, 4, 8, 4), (2, 3, 2, 16, 32),
        (1, 2, 6, 16, 32, 1), (2, 48, 64), (2, 24, 128), (96, 2, 32), (2, 768, 4), (3, 4, 16, 32),
        (2, 12, 8, 32), (2, 192, 16), (32, 3, 64), (4, 6, 8, 32), (2, 4, 24, 32), (24, 256),
    ]
} | {
    f"dynamic slice at {at}": functools.partial(
        lambda at, a: lax.dynamic_slice(a, (0, 2, at, 5), (2, 3, 5, 16)), at
    )
    for at in (0, 3, 9, 14, 20)
} | {
    f"page at {at}": functools.partial(lambda at, a: lax.dynamic_slice_in_dim(a, at, 2, 1), at)
    for at in (0, 3, 9)
}  # fmt: skip

CUTS = {
    "slice",
    "slice within a block",
    *(name for name in MOVES if name.startswith("dynamic slice")),
    *(name for name in MOVES if name.startswith("reshape") and " 32)" not in name and " 32, 1)" not in name),
}
"""Moves that take channels apart, which a format that turns them has to be decoded for."""

SCALINGS = {"times": lambda a: a * 0.3, "over": lambda a: a / 0.3, "negative": lambda a: -a}

NEW = normal(2, 6, 1, 32, seed=6)
PAGE = normal(2, 1, 16, 32, seed=7)


def with_page(a):
    return jnp.concatenate([a, PAGE.astype(a.dtype)], 1)


JOINS = {
    "a page": with_page,
    "a page before": lambda a: jnp.concatenate([PAGE, a], 1),
    "a slot": lambda a: jnp.concatenate([a, NEW], 2),
    "itself, scaled": lambda a: jnp.concatenate([a, a * 0.5, PAGE], 1),
    "a page, then another": lambda a: jnp.concatenate([with_page(a), PAGE], 1),
    "transpose": lambda a: with_page(a).transpose(2, 0, 3, 1),
    "squeeze": lambda a: with_page(a)[:1].squeeze(0),
    "expand": lambda a: with_page(a)[:, None, ..., None],
    "reshape": lambda a: with_page(a).reshape(2, 7, 4, 4, 32),
    "broadcast": lambda a: jnp.broadcast_to(with_page(a)[:, :, None], (2, 7, 3, 16, 32)),
    "repeat": lambda a: jnp.repeat(with_page(a), 2, axis=0),
    "convert": lambda a: with_page(a).astype(jnp.float16),
    "times": lambda a: with_page(a) * 0.5,
    "negative": lambda a: -with_page(a),
    "slice": lambda a: with_page(a)[1:, 2:, 4:8],
    "slice of one part": lambda a: with_page(a)[:, 1:3],
    "slice of the other": lambda a: with_page(a)[:, 6:],
    "empty slice": lambda a: with_page(a)[:, 2:2],
    "slice of other axes": lambda a: with_page(a)[:, :, ::2],
}

P = normal(2, 3, 96, seed=2)
Q = normal(2, 3, 32, seed=3)
P_WITH_PAGE = normal(2, 3, 7, 16, seed=8)
WIDE = normal(2, 300, 32, seed=4)

DOTS = {
    "scores": lambda a: jnp.einsum("hgd,hpsd->hgps", Q, a),
    "scores, keys first": lambda a: jnp.einsum("hpsd,hgd->hpsg", a, Q),
    "scores of many queries": lambda a: jnp.einsum("hgd,hpsd->hgps", WIDE, a),
    "values": lambda a: jnp.einsum("hgt,htd->hgd", P, a.reshape(2, 96, 32)),
    "values, transposed": lambda a: jnp.einsum("htd,hgt->dhg", a.reshape(2, 96, 32), P),
    "values by page": lambda a: jnp.einsum("hgps,hpsd->hgd", P.reshape(2, 3, 6, 16), a),
    "no batch": lambda a: jnp.einsum("hpsd,kd->pshk", a, Q[0]),
    "everything contracted": lambda a: jnp.einsum("hpsd,hpsd->", a, normal(2, 6, 16, 32, seed=5)),
    "both quantized": lambda a: jnp.einsum("hpsd,hptd->hpst", a, a),
    "of a transpose": lambda a: a.reshape(192, 32).T @ normal(192, 4, seed=6),
    "of a stretched axis": lambda a: jnp.einsum(
        "hgd,hgpsd->hgps", Q, jnp.broadcast_to(a[:, None], (2, 3, 6, 16, 32))
    ),
}  # fmt: skip


DOTS_OF_JOINS = {
    "scores": lambda a: jnp.einsum("hgd,hpsd->hgps", Q, with_page(a)),
    "scores, keys first": lambda a: jnp.einsum("hpsd,hgd->hpsg", with_page(a), Q),
    "values": lambda a: jnp.einsum("hgps,hpsd->hgd", P_WITH_PAGE, with_page(a)),
    "values, transposed": lambda a: jnp.einsum("hpsd,hgps->dhg", with_page(a), P_WITH_PAGE),
    "of a slice of one part": lambda a: jnp.einsum("hgd,hpsd->hgps", Q, with_page(a)[:, 1:3]),
    "of copies": lambda a: jnp.einsum("hgd,hpsd->hgps", jnp.repeat(Q, 2, 0), jnp.repeat(with_page(a), 2, 0)),
    "everything contracted": lambda a: jnp.einsum("hpsd,hpsd->", with_page(a), normal(2, 7, 16, 32, seed=5)),
}


def lazily(program, array):
    """The program's result under use_implicit_args; a materialization is an error, as every warning is."""
    return jax.jit(use_implicit_args(program))(array)


def both_ways(programs, array):
    """(name, lazy result, its values, result on the values) of every program, compiled together."""
    run = use_implicit_args(lambda a: {name: program(a) for name, program in programs.items()})

    @jax.jit
    def together(array):
        lazy = run(array)
        return lazy, jax.tree_util.tree_map(values, lazy, is_leaf=is_implicit), run(array.materialize())

    lazy, out, want = together(array)
    return [(name, once(lazy[name]), out[name], want[name]) for name in programs]


def is_quantized(leaf):
    return isinstance(leaf, qpaged.QuantizedArray)


def is_implicit(leaf):
    return isinstance(leaf, ImplicitArray)


def values(leaf):
    return materialize_nested(leaf, full=True) if is_implicit(leaf) else leaf


def once(leaf):
    """What stands for an array whose elements are repeated: that array."""
    return leaf.array if isinstance(leaf, Repeated) else leaf


@pytest.fixture(params=WITH_LONG)
def array(request):
    """A filled array."""
    return quantized(request.param)


def assert_same_values(array, out, want, name):
    """Out must be want, but that a rotation rounds where its scales are no powers of two and float32."""
    is_rounded = array.quantizer.transform is not None and array.scales.dtype == jnp.float32
    rounding = (
        8 * float(jnp.finfo(jnp.float32).eps) * float(jnp.abs(want).max(initial=0)) if is_rounded else 0
    )
    np.testing.assert_allclose(out, want, rtol=0, atol=rounding, err_msg=name)


def test_moves_are_exact(array):
    cuts = CUTS if array.quantizer.transform is not None else ()
    moves = {name: move for name, move in MOVES.items() if name not in cuts}
    for name, lazy, out, want in both_ways(moves, array):
        assert is_quantized(lazy) and lazy.codes.dtype.itemsize == array.codes.dtype.itemsize, name
        assert lazy.dtype == out.dtype == want.dtype, name
        assert (lazy.shape == want.shape or name == "broadcast") and out.shape == want.shape, name
        assert_same_values(array, out, want, name)


@pytest.mark.parametrize("name", sorted(CUTS - {name for name in CUTS if name.startswith("dynamic")}))
def test_turned_channels_are_decoded_to_be_taken_apart(name):
    array = quantized("int8+rotate")
    with pytest.warns(UserWarning, match="materialized"):
        out = lazily(MOVES[name], array)
    np.testing.assert_array_equal(out, jax.jit(MOVES[name])(array.materialize()))


@pytest.mark.parametrize("format", ["int4", "int2+offset", "int8+rotate"])
def test_moves_that_keep_channels_whole_keep_codes_packed(format):
    array = quantized(format)
    for name in ("transpose", "take pages and slots", "broadcast", "stack", "concatenate slots", "expand"):
        moved = once(lazily(MOVES[name], array))
        assert is_quantized(moved) and moved.quantizer == array.quantizer, name
        assert moved.codes.size * array.codes_per_byte == moved.size, name


def test_scaling_keeps_the_codes(array):
    for name, lazy, out, want in both_ways(SCALINGS, array):
        assert is_quantized(lazy) and lazy.codes.dtype == array.codes.dtype, name
        # offsets are added to products rounded apart, and a rotation adds terms as large as the largest
        rounding = 2 * float(jnp.finfo(jnp.float32).eps) * float(jnp.abs(want).max())
        np.testing.assert_allclose(out, want, rtol=1e-6, atol=max(rounding, 1e-6), err_msg=name)


def test_dots_fold_their_scales(array):
    for name, lazy, out, want in both_ways(DOTS, array):
        assert not is_quantized(lazy) and (out.shape, out.dtype) == (want.shape, want.dtype), name
        # float32 sums in another order: of at most 96 products, or of 6144 where all is contracted
        np.testing.assert_allclose(
            out,
            want,
            rtol=2e-6,
            atol=6144 * 2.0**-24 if want.ndim == 0 else 2e-6 * float(jnp.abs(want).max()),
            err_msg=name,
        )


@needs_own_implementation
def test_joins_are_exact(array):
    for name, lazy, out, want in both_ways(JOINS, array):
        kind = jax.Array if name == "slice of the other" else Joined | qpaged.QuantizedArray
        assert isinstance(lazy, kind), name
        assert lazy.dtype == out.dtype == want.dtype and lazy.shape == out.shape == want.shape, name
        assert_same_values(array, out, want, name)


@needs_own_implementation
def test_dots_of_joins_are_taken_of_each_part(array):
    for name, lazy, out, want in both_ways(DOTS_OF_JOINS, array):
        assert isinstance(lazy, jax.Array) and (out.shape, out.dtype) == (want.shape, want.dtype), name
        # float32 sums in another order: of at most 112 products, or of 7168 where all is contracted
        atol = 7168 * 2.0**-24 if want.ndim == 0 else 2e-6 * float(jnp.abs(want).max())
        np.testing.assert_allclose(out, want, rtol=2e-6, atol=atol, err_msg=name)


@needs_own_implementation
@pytest.mark.filterwarnings("default")
def test_what_a_join_cannot_do_is_said_at_its_line():
    with pytest.warns(MaterializeWarning, match="Joined has no handler for the primitive 'exp'"):
        out = lazily(lambda a: jnp.exp(with_page(a)), quantized("int8"))
    assert out.shape == (2, 7, 16, 32)


@pytest.mark.short(4)
@pytest.mark.parametrize("format", FORMATS)
def test_bfloat16_dots_round_once(format):
    array = quantized(format, dtype=jnp.bfloat16)
    query = Q.astype(jnp.bfloat16)
    out = lazily(lambda a: jnp.einsum("hgd,hpsd->hgps", query, a), array)
    want = jnp.einsum("hgd,hpsd->hgps", query.astype(jnp.float32), array.dequantize())
    assert out.dtype == jnp.bfloat16
    # one rounding of the result, and for scales of a channel one of the query
    scale = np.einsum("hgd,hpsd->hgps", np.abs(query.astype(np.float32)), np.abs(array.dequantize()))
    assert (np.abs(out.astype(np.float32) - want) <= 2**-8 * np.abs(want) + 2**-8 * scale).all()


def test_scales_of_a_page_stay_one_a_page():
    array = quantized("int8")
    assert lazily(MOVES["transpose"], array).scales.size == array.scales.size
    assert lazily(lambda a: a.reshape(2, 96, 32), array).block == (1, 16, 32)
    assert lazily(lambda a: a[:, 2:4], array).block == (1, 1, 16, 32)
    assert lazily(lambda a: a[:, :, 4:8], array).scales.shape == (2, 6, 1, 1)


def test_what_cannot_stay_quantized_warns_and_is_right():
    array = quantized("int8")
    with pytest.warns(UserWarning, match="exp"):
        out = use_implicit_args(lambda a: jnp.exp(a))(array)
    np.testing.assert_array_equal(out, jnp.exp(array.materialize()))
