"""Implicit arrays under jit, grad and vmap, inside of use_implicit_args and around it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.implicit_arrays import KINDS, Derived, Scaled, dense, example, needs_own_implementation

import qpaged.implicit as qi

pytestmark = [
    pytest.mark.parametrize("kind", KINDS),
    pytest.mark.filterwarnings("ignore:Derived has no handler", "ignore:Primitive .* was not handled"),
]


def double(x):
    return x * 2.0


@pytest.mark.parametrize("jit_position", ["eager", "jit outside", "jit inside", "jit both"])
def test_an_array_stays_implicit_through_jit(kind, jit_position):
    f = jax.jit(double) if "inside" in jit_position or "both" in jit_position else double
    f = qi.use_implicit_args(f)
    f = jax.jit(f) if "outside" in jit_position or "both" in jit_position else f
    out = f(example(kind))
    assert isinstance(out, kind)
    assert out.shape == (4, 3)
    np.testing.assert_array_equal(dense(out), 2 * dense(example(kind)))
    np.testing.assert_array_equal(out.codes, example(kind).codes)


@needs_own_implementation
def test_an_inner_jit_stays_a_jit_of_the_same_name(kind):
    def named_by_its_author(x):
        return x * 2.0

    jaxpr = jax.make_jaxpr(qi.use_implicit_args(jax.jit(named_by_its_author)))(example(kind))
    assert [eqn.params["name"] for eqn in jaxpr.eqns] == ["named_by_its_author"]


@needs_own_implementation
def test_an_inner_jit_is_traced_once(kind):
    runs = []

    @qi.primitive_handler("tan")
    def _(primitive, x: kind, **params):
        runs.append(x)
        return -x.codes.astype(jnp.float32)

    inner = jax.jit(jnp.tan)
    for _ in range(3):
        qi.use_implicit_args(lambda w: inner(w))(example(kind))
    assert len(runs) == 1


@needs_own_implementation
def test_an_inner_jit_keeps_sharding_constraints(kind):
    mesh = jax.make_mesh((4,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.NamedSharding(mesh, jax.P("d"))
    inner = jax.jit(lambda x, y: (x * 2.0, y + 1.0), in_shardings=(None, sharding), out_shardings=None)
    out, y = qi.use_implicit_args(inner)(example(kind), jnp.zeros(8))
    assert isinstance(out, kind)
    np.testing.assert_array_equal(y, jnp.ones(8))


def test_grad_inside_of_a_dense_argument(kind):
    def f(w, x):
        return jax.grad(lambda x: jnp.sum(jnp.sin(w) @ x))(x)

    w, x = example(kind), jnp.arange(3.0)
    expected = f(dense(w), x)
    np.testing.assert_allclose(qi.use_implicit_args(f)(w, x), expected, rtol=1e-6)
    np.testing.assert_allclose(jax.jit(qi.use_implicit_args(f))(w, x), expected, rtol=1e-6)


def test_grad_inside_of_the_implicit_argument_is_dense(kind):
    grad = qi.use_implicit_args(jax.grad(lambda w: jnp.sum(jnp.sin(w * 3.0))))(example(kind))
    np.testing.assert_allclose(grad, 3 * jnp.cos(3 * dense(example(kind))), rtol=1e-6)


def test_grad_outside_is_of_the_leaves(kind):
    f = qi.use_implicit_args(lambda w: jnp.sum(jnp.sin(w * 2.0)))
    w = example(kind)
    grad = jax.grad(f, allow_int=True)(w)
    assert isinstance(grad, kind)
    expected = jax.grad(lambda s: jnp.sum(jnp.sin(w.codes.astype(jnp.float32) * s * 2)))(w.scale)
    np.testing.assert_allclose(grad.scale, expected, rtol=1e-6)


def test_vmap_inside(kind):
    f = qi.use_implicit_args(lambda w: jax.vmap(lambda row: row * 2.0 + 1.0)(w))
    np.testing.assert_array_equal(f(example(kind)), 2 * dense(example(kind)) + 1)


def test_vmap_outside_sees_one_example(kind):
    shapes = []

    def f(w):
        shapes.append(w.shape)
        return -w

    batch = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[example(kind)] * 5)
    out = jax.vmap(qi.use_implicit_args(f))(batch)
    assert shapes == [(4, 3)]
    np.testing.assert_array_equal(out.codes, -batch.codes)


def test_grad_of_vmap_of_jit(kind):
    f = jax.jit(qi.use_implicit_args(lambda w, x: jnp.sum(jnp.tanh(w * x))))
    w, xs = example(kind), jnp.arange(1.0, 4.0) / 4
    grads = jax.vmap(jax.grad(f, argnums=1), (None, 0))(w, xs)
    expected = jax.vmap(jax.grad(lambda x: jnp.sum(jnp.tanh(dense(w) * x))))(xs)
    np.testing.assert_allclose(grads, expected, rtol=1e-5)


def test_arguments_that_are_not_implicit_are_passed_as_they_are(kind):
    def f(w, flag, name, n, *, concrete):
        assert name == "a name"
        assert flag is True
        assert int(concrete) == 7
        return w * float(n), name

    out, name = qi.use_implicit_args(f)(example(kind), True, "a name", 3, concrete=jnp.array(7))
    assert isinstance(out, kind)
    assert name == "a name"


@needs_own_implementation
def test_implicit_children_of_implicit_arrays_are_handled(kind):
    inner = example(Derived if kind is Scaled else Scaled, (1, 1))
    outer = Scaled(jnp.arange(12, dtype=jnp.int8).reshape(4, 3), inner)
    f = qi.use_implicit_args(lambda x: x * 2.0)
    expected = outer.codes.astype(jnp.float32) * dense(inner) * 2
    for call in (f, jax.jit(f)):
        out = call(outer)
        assert isinstance(out.scale, type(inner))
        np.testing.assert_array_equal(out.scale.codes, inner.codes)
        np.testing.assert_array_equal(qi.materialize_nested(out, full=True), expected)


@pytest.mark.parametrize("inner", [lambda f: f, jax.jit], ids=["plain", "jit"])
def test_donation_updates_in_place(kind, inner):
    write = inner(lambda w, x: jax.lax.dynamic_update_slice(w, x, (1, 0)))
    f = jax.jit(qi.use_implicit_args(write), donate_argnums=0)
    w = example(kind, (64, 128))
    w = kind(w.codes, jnp.full((1, 128), 0.5))
    x = jnp.ones((1, 128))
    compiled = f.lower(w, x).compile()
    assert compiled.memory_analysis().alias_size_in_bytes == 64 * 128 + 4 * 128
    pointer = w.codes.unsafe_buffer_pointer()
    out = f(w, x)
    assert w.codes.is_deleted()
    assert out.codes.unsafe_buffer_pointer() == pointer
    assert (out.codes[1] == 1).all()


@needs_own_implementation
def test_references_are_not_converted(kind):
    ref = jax.new_ref(jnp.zeros((4, 3)))

    def f(w):
        ref[...] = jnp.sin(w) * ref[...] + 1.0
        return w * 2.0

    assert isinstance(qi.use_implicit_args(f)(example(kind)), kind)
    np.testing.assert_array_equal(ref[...], jnp.ones((4, 3)))
