"""Implicit arrays in checkpoint and in functions with custom derivatives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.implicit_arrays import KINDS, dense, example, needs_own_implementation

import qpaged.implicit as qi

pytestmark = [
    pytest.mark.parametrize("kind", KINDS),
    pytest.mark.filterwarnings("ignore:Derived has no handler", "ignore:Primitive .* was not handled"),
]


@jax.custom_jvp
def jvp_triple(x):
    return x * 2.0


@jvp_triple.defjvp
def _(primals, tangents):
    return jvp_triple(*primals), tangents[0] * 3.0  # not the true 2, to show that the rule was used


@jax.custom_vjp
def vjp_triple(x):
    return x * 2.0


vjp_triple.defvjp(lambda x: (x * 2.0, None), lambda _, g: (g * 3.0,))


@needs_own_implementation
@pytest.mark.parametrize("f", [jvp_triple, vjp_triple])
def test_functions_with_custom_derivatives_take_implicit_operands(kind, f):
    out = jax.jit(qi.use_implicit_args(f))(example(kind))
    np.testing.assert_array_equal(out, 2 * dense(example(kind)))


@needs_own_implementation
@pytest.mark.parametrize("f", [jvp_triple, vjp_triple])
def test_grad_outside_uses_the_custom_rule(kind, f):
    w = example(kind)
    loss = qi.use_implicit_args(lambda w: jnp.sum(f(w)))
    for grad in (jax.grad(loss, allow_int=True), jax.jit(jax.grad(loss, allow_int=True))):
        np.testing.assert_allclose(grad(w).scale, 3 * jnp.sum(w.codes.astype(jnp.float32)).reshape(1, 1))


@needs_own_implementation
@pytest.mark.parametrize("f", [jvp_triple, vjp_triple])
def test_grad_inside_uses_the_custom_rule(kind, f):
    grad = qi.use_implicit_args(jax.grad(lambda w: jnp.sum(f(w))))(example(kind))
    np.testing.assert_array_equal(grad, jnp.full((4, 3), 3.0))


@pytest.mark.parametrize("f", [jvp_triple, vjp_triple])
def test_a_dense_operand_beside_an_implicit_one_uses_the_custom_rule(kind, f):
    loss = qi.use_implicit_args(lambda w, x: jnp.sum(f(x)) + jnp.sum(jnp.sin(w)))
    np.testing.assert_array_equal(jax.grad(loss, argnums=1)(example(kind), jnp.ones(2)), [3.0, 3.0])


@needs_own_implementation
def test_a_custom_rule_of_an_implicit_and_a_dense_operand_is_used(kind):
    @jax.custom_vjp
    def f(w, x):
        return w @ x

    f.defvjp(lambda w, x: (w @ x, (w, x)), lambda r, g: (jnp.outer(g, r[1]), 10 * (r[0].T @ g)))
    w, x = example(kind), jnp.arange(3.0)
    grad = jax.grad(qi.use_implicit_args(lambda x, w: jnp.sum(f(w, x))))(x, w)
    np.testing.assert_allclose(grad, 10 * dense(w).sum(0))


def test_softmax_and_silu_have_the_gradients_of_dense_operands(kind):
    f = qi.use_implicit_args(lambda w, x: jnp.sum(jax.nn.silu(w) * jax.nn.softmax(x)))
    w, x = example(kind), jnp.arange(12.0).reshape(4, 3)
    expected = jax.grad(lambda x: jnp.sum(jax.nn.silu(dense(w)) * jax.nn.softmax(x)))(x)
    np.testing.assert_allclose(jax.grad(f, argnums=1)(w, x), expected, rtol=1e-5)


def test_checkpoint_stays_in_the_jaxpr_with_its_parameters(kind):
    f = qi.use_implicit_args(lambda w: jax.checkpoint(lambda w: jnp.sin(w * 2.0), prevent_cse=False)(w))
    jaxpr = jax.make_jaxpr(f)(example(kind))
    (eqn,) = jaxpr.eqns
    assert eqn.primitive.name == "remat2"
    assert eqn.params["prevent_cse"] is False
    np.testing.assert_allclose(f(example(kind)), jnp.sin(2 * dense(example(kind))), rtol=1e-6)


def test_checkpoint_returns_implicit_arrays(kind):
    out = jax.jit(qi.use_implicit_args(jax.checkpoint(lambda w: w * 2.0)))(example(kind))
    assert isinstance(out, kind)
    np.testing.assert_array_equal(dense(out), 2 * dense(example(kind)))


def test_grad_through_checkpoint_is_that_of_dense_operands(kind):
    def loss(x, w):
        block = jax.checkpoint(lambda x: jnp.tanh(w @ x), policy=jax.checkpoint_policies.nothing_saveable)
        return jnp.sum(block(x))

    w, x = example(kind), jnp.arange(3.0) / 8
    expected = jax.grad(loss)(x, dense(w))
    for f in (jax.grad(qi.use_implicit_args(loss)), qi.use_implicit_args(jax.grad(loss))):
        np.testing.assert_allclose(f(x, w), expected, rtol=1e-6)
        np.testing.assert_allclose(jax.jit(f)(x, w), expected, rtol=1e-6)


def test_checkpoint_closes_over_constants(kind):
    table = np.arange(12, dtype=np.float32).reshape(4, 3)
    out = qi.use_implicit_args(jax.checkpoint(lambda w: w + table))(example(kind))
    np.testing.assert_array_equal(out, dense(example(kind)) + table)
