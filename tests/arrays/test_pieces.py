"""Dots over long axes decode a piece at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.arrays import normal
from support.formats import FEW

import qpaged
from qpaged.implicit import use_implicit_args
from qpaged.testing._laws_cost import arrays_in

LONG = 1200  # two pieces and a rest, in blocks of 8
Q = normal(2, 4, 32, seed=1)
WEIGHTS = normal(2, 4, LONG, seed=2)

DOTS = {
    "kept": lambda q, w, k: jnp.einsum("bqd,bsd->bqs", q, k),
    "contracted": lambda q, w, k: jnp.einsum("bqs,bsd->bqd", w, k),
    "a batch": lambda q, w, k: jnp.einsum("bqs,bsd->bsqd", w, k),
    "left": lambda q, w, k: jnp.einsum("bsd,bqd->bsq", k, q),
}


def floats(jaxpr):
    """The floats that a program makes, inner programs included."""
    return [aval for _, aval in arrays_in(jaxpr.jaxpr) if jnp.issubdtype(aval.dtype, jnp.floating)]


def long_array(format, dtype=jnp.float32):
    quantizer = qpaged.get_quantizer(format)
    slots, channels = quantizer.block((8, 32))
    values = normal(2, LONG, 32).astype(dtype)
    return qpaged.arrays.quantize(values, quantizer, (1, slots, channels))


@pytest.mark.parametrize("format", FEW)
def test_pieces_add_up(format):
    array = long_array(format)
    run = jax.jit(use_implicit_args(lambda *a: {name: program(*a) for name, program in DOTS.items()}))
    got = run(Q, WEIGHTS, array)
    for name, program in DOTS.items():
        want = program(Q, WEIGHTS, array.dequantize())
        np.testing.assert_allclose(got[name], want, rtol=1e-4, atol=2e-3, err_msg=name)


@pytest.mark.parametrize(
    "format",
    [
        "int8",
        "int4:token",
        pytest.param("int8:channel+offset", marks=pytest.mark.long),
        "int8+rotate",
        pytest.param("nvfp4", marks=pytest.mark.long),
    ],
)
@pytest.mark.parametrize("name", ["kept", "contracted", "left"])
def test_the_whole_is_never_decoded(name, format):
    array, program = long_array(format), DOTS[name]
    lazy = use_implicit_args(program)
    out = jax.eval_shape(lazy, Q, WEIGHTS, array)
    shapes = {
        aval.shape for aval in floats(jax.make_jaxpr(lazy)(Q, WEIGHTS, array)) if aval.shape != out.shape
    }
    assert max(map(np.prod, shapes)) < max(array.size, out.size)


def test_gradients_through_pieces_keep_nothing_decoded():
    array = long_array("int8")

    def loss(q, k):
        return (jnp.einsum("bqd,bsd->bqs", q, k) ** 2).sum()

    got = jax.jit(jax.grad(use_implicit_args(loss)))(Q, array)
    want = jax.grad(loss)(Q, array.dequantize())
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-2)


def test_transposed_arrays_are_cut_along_the_same_axis():
    """Where channels may lie anywhere, the last axis may be the long one."""
    array = long_array("int8")
    program = use_implicit_args(lambda q, k: jnp.einsum("bqd,bds->bqs", q, k))
    turned = use_implicit_args(lambda k: k.transpose(0, 2, 1))(array)
    np.testing.assert_allclose(
        jax.jit(program)(Q, turned), jnp.einsum("bqd,bsd->bqs", Q, array.dequantize()), rtol=1e-4, atol=1e-3
    )
    assert turned.shape not in {aval.shape for aval in floats(jax.make_jaxpr(program)(Q, turned))}
