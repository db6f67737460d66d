"""What models with grouped heads do before their dots: repeat the heads, which copies no codes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.arrays import normal, quantized

import qpaged
from qpaged.arrays._repeated import Repeated
from qpaged.implicit import materialize_nested, provider, use_implicit_args

pytestmark = pytest.mark.skipif(provider().name == "qax", reason="with qax, what is repeated is copied")

TIMES = 3
SHAPE = (2, 6, 16, 32)

DOTS = {
    "batch axis, right": lambda q, k: jnp.einsum("bhqd,bhsd->bhqs", q, jnp.repeat(k, TIMES, 1)),
    "batch axis, left": lambda q, k: jnp.einsum("bhsd,bhqd->bhsq", jnp.repeat(k, TIMES, 1), q),
    "batch axis, contracting slots": lambda q, k: jnp.einsum(
        "bhqs,bhsd->bhqd", q[..., :16], jnp.repeat(k, TIMES, 1)
    ),
    "scaled, converted and turned": lambda q, k: jnp.einsum(
        "bhqd,sbhd->bhqs", q, (jnp.repeat(k, TIMES, 1) * 0.5).astype(jnp.float32).transpose(2, 0, 1, 3)
    ),
    "copies that stay apart": lambda q, k: jnp.einsum(
        "bkgqd,bkgsd->bkgqs",
        q.reshape(2, 6, TIMES, 4, 32),
        jnp.broadcast_to(k[:, :, None], (2, 6, TIMES, 16, 32)),
    ),
}
COPIED = {
    "no copies": lambda q, k: jnp.repeat(k, 0, 1),
    "copies contracted": lambda q, k: jnp.einsum("bhqd,bhsd->qs", q, jnp.repeat(k, TIMES, 1)),
    "copies kept": lambda q, k: jnp.einsum("bqd,bhsd->bqhs", q[:, 0], jnp.repeat(k, TIMES, 1)),
    "a part": lambda q, k: jnp.repeat(k, TIMES, 1)[:, 2:5],
    "a sum": lambda q, k: jnp.einsum("bhqd,bhsd->bhqs", q, jnp.concatenate([k] * TIMES, 1)),
    "tiled": lambda q, k: jnp.einsum("bhqd,bhsd->bhqs", q, jnp.tile(k, (1, TIMES, 1, 1))),
    "both": lambda q, k: jnp.einsum("bhtd,bhsd->bhts", jnp.repeat(k, TIMES, 1), jnp.repeat(k, TIMES, 1)),
}
Q = normal(2, 6 * TIMES, 4, 32, seed=3)


def codes_at_most(jaxpr, array):
    """Whether no integers of the program are more than the array's codes."""
    sizes = [
        var.aval.size
        for eqn in jaxpr.jaxpr.eqns
        for var in eqn.outvars
        if jnp.issubdtype(var.aval.dtype, jnp.integer)
    ]
    return max(sizes, default=0) <= array.size


@pytest.mark.short(7)
@pytest.mark.parametrize("format", ["int8", "int4", "nvfp4", "int8:token+offset"])
@pytest.mark.parametrize("name", sorted(DOTS))
def test_dots_are_those_of_copies(name, format):
    array, program = quantized(format, SHAPE), DOTS[name]
    lazy = use_implicit_args(program)
    got = jax.jit(lazy)(Q, array)
    want = program(Q, array.dequantize())
    np.testing.assert_allclose(got, want, rtol=2e-4, atol=2e-4)
    assert codes_at_most(jax.make_jaxpr(lazy)(Q, array), array)


@pytest.mark.parametrize("name", sorted(COPIED))
def test_what_is_not_a_dot_over_the_copies_copies_codes(name):
    array, program = quantized("int8", SHAPE), COPIED[name]
    got = materialize_nested(jax.jit(use_implicit_args(program))(Q, array), full=True)
    np.testing.assert_allclose(got, program(Q, array.dequantize()), rtol=2e-4, atol=2e-4)


def test_copies_may_leave_the_program():
    array = quantized("int8", SHAPE)
    repeated = use_implicit_args(lambda k: jnp.repeat(k, TIMES, 1))(array)
    assert isinstance(repeated, Repeated)
    assert (repeated.shape, repeated.dtype) == ((2, 18, 16, 32), jnp.float32)
    copies = repeated.materialize()
    assert isinstance(copies, qpaged.QuantizedArray)
    np.testing.assert_array_equal(copies.dequantize(), jnp.repeat(array.dequantize(), TIMES, 1))
