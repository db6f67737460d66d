"""Implicit arrays whose pytree has no leaves, in every transformation."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.implicit_arrays import needs_own_implementation

import qpaged.implicit as qi

pytestmark = needs_own_implementation


class Zeros(qi.ImplicitArray, warn_on_materialize=False):
    default_dtype = jnp.float32

    def materialize(self):
        return jnp.zeros(self.shape, self.dtype)


@qi.primitive_handler("mul")
def _(primitive, a: Zeros, b: Any, **params):
    return Zeros(shape=jnp.broadcast_shapes(a.shape, b.shape))


def in_shard_map(x):
    mesh = jax.make_mesh((4,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    return jax.shard_map(lambda x: x * 2.0, mesh=mesh, in_specs=jax.P("d"), out_specs=jax.P("d"))(x)


PROGRAMS = {
    "scan carry": lambda x: jax.lax.scan(lambda c, _: (c * 2.0, None), x, length=3)[0],
    "scan xs and ys": lambda x: jax.lax.scan(lambda c, row: (c, row * 2.0), 0.0, x)[1],
    "while": lambda x: jax.lax.fori_loop(0, 3, lambda i, x: x * 2.0, x),
    "cond": lambda x: jax.lax.cond(jnp.bool_(True), lambda x: x * 2.0, lambda x: x * 3.0, x),
    "checkpoint": jax.checkpoint(lambda x: x * 2.0),
    "jit": jax.jit(lambda x: x * 2.0),
    "shard_map": in_shard_map,
}


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_an_array_without_children_stays_implicit(program, wrap):
    out = wrap(qi.use_implicit_args(PROGRAMS[program]))(Zeros(shape=(4, 3)))
    assert isinstance(out, Zeros)
    assert (out.shape, out.dtype) == ((4, 3), jnp.float32)


def test_random_keys_can_be_implicit():
    @dataclass
    class Key(qi.ImplicitArray, warn_on_materialize=False):
        key: Any

        def materialize(self):
            return self.key

    sample = qi.use_implicit_args(lambda key: jax.random.normal(key, (2,)))(Key(jax.random.key(0)))
    np.testing.assert_array_equal(sample, jax.random.normal(jax.random.key(0), (2,)))


def test_no_tracer_leaks():
    with jax.checking_leaks():
        for program in PROGRAMS.values():
            jax.jit(qi.use_implicit_args(program))(Zeros(shape=(4, 3)))
