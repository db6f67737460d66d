"""Implicit arrays divided over devices, with Auto and with Explicit mesh axes."""

import functools
import warnings
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.implicit_arrays import KINDS, dense, example, needs_own_implementation

import qpaged.implicit as qi

pytestmark = [pytest.mark.parametrize("kind", KINDS), needs_own_implementation]


@pytest.fixture(params=["Auto", "Explicit"])
def mesh(request):
    axis_type = getattr(jax.sharding.AxisType, request.param)
    with jax.set_mesh(jax.make_mesh((4, 2), ("d", "e"), axis_types=(axis_type,) * 2)):
        yield jax.sharding.get_abstract_mesh()


def sharded_example(kind, *spec, shape=(8, 6), scale_shape=None):
    """Return an example that is sharded over the mesh, with its axes of size 1 replicated."""
    w = example(kind, shape)
    scale = w.scale if scale_shape is None else jnp.full(scale_shape, 0.5)
    scale_spec = [None if n == 1 else s for n, s in zip(scale.shape, spec, strict=True)]
    return kind(jax.device_put(w.codes, jax.P(*spec)), jax.device_put(scale, jax.P(*scale_spec)))


def ignoring_materialize_warnings():
    return warnings.catch_warnings(action="ignore", category=qi.MaterializeWarning)


def expected(w):
    return np.asarray(w.codes, np.float32) * np.asarray(w.scale)


@pytest.mark.parametrize("check_vma", [True, False])
def test_a_shard_map_body_sees_the_local_shape(kind, mesh, check_vma):
    shapes = []

    def f(w):
        @functools.partial(
            jax.shard_map, in_specs=jax.P("d", None), out_specs=jax.P("d", None), check_vma=check_vma
        )
        def body(w):
            shapes.append(w.shape)
            return jnp.cos(w * 2.0)

        return body(w)

    w = sharded_example(kind, "d", None)
    with ignoring_materialize_warnings():
        out = jax.jit(qi.use_implicit_args(f))(w)
    assert shapes == [(2, 6)]
    np.testing.assert_allclose(out, np.cos(2 * expected(w)), rtol=1e-6)


@pytest.mark.parametrize(("shape", "scale_shape"), [((8, 6), (8, 1)), ((8, 6), (1, 6)), ((4, 6), (4, 1))])
def test_outputs_stay_implicit_if_their_leaves_can_be_put_together(kind, mesh, shape, scale_shape):
    f = jax.shard_map(lambda w: -w, in_specs=jax.P("d", None), out_specs=jax.P("d", None))
    w = sharded_example(kind, "d", None, shape=shape, scale_shape=scale_shape)
    out = jax.jit(qi.use_implicit_args(f))(w)
    assert isinstance(out, kind)
    assert out.shape == w.shape
    assert out.scale.shape == scale_shape
    np.testing.assert_array_equal(expected(out), -expected(w))


def test_a_shared_leaf_that_may_differ_by_device_makes_the_output_dense(kind, mesh):
    def f(w, x):
        def body(w, x):
            return w * x[0]

        return jax.shard_map(body, in_specs=(jax.P("d", None), jax.P("d")), out_specs=jax.P("d", None))(w, x)

    w = sharded_example(kind, "d", None)
    x = jax.device_put(jnp.arange(4.0), jax.P("d"))
    with qi.record_materializations() as records, ignoring_materialize_warnings():
        out = jax.jit(qi.use_implicit_args(f))(w, x)
    assert [r.primitive for r in records] == ["shard_map"]
    np.testing.assert_array_equal(out, expected(w) * np.repeat(np.arange(4.0), 2)[:, None])


def test_an_operand_whose_leaves_do_not_divide_is_materialized(kind, mesh):
    """The 8 columns divide over 4 devices, but the 2 scales, one for every 4 columns, do not."""

    @dataclass
    class Grouped(qi.ImplicitArray):
        codes: Any
        scale: Any

        def materialize(self):
            width = self.codes.shape[1] // self.scale.shape[1]
            return self.codes.astype(jnp.float32) * jnp.repeat(self.scale, width, axis=1)

    def f(w):
        return jax.shard_map(lambda x: x + 1.0, in_specs=jax.P(None, "d"), out_specs=jax.P(None, "d"))(w)

    codes = jax.device_put(example(kind, (2, 8)).codes, jax.P(None, "d"))
    if mesh.axis_types[0] == jax.sharding.AxisType.Explicit:
        pytest.skip("materialize() itself would have to say how its repeat is sharded")
    w = Grouped(codes, jnp.array([[0.5, 1.0]] * 2))
    with pytest.warns(qi.MaterializeWarning, match="shard_map"):
        out = jax.jit(qi.use_implicit_args(f))(w)
    correct = np.asarray(codes, np.float32) * np.repeat([[0.5, 1.0]] * 2, 4, axis=1) + 1
    np.testing.assert_array_equal(out, correct)


def test_collectives_work_inside(kind, mesh):
    def f(w, x):
        def body(w, x):
            return jax.lax.psum(jnp.sum((w * 2.0) * x), "d")

        return jax.shard_map(body, in_specs=(jax.P("d", None), jax.P("d", None)), out_specs=jax.P())(w, x)

    w = sharded_example(kind, "d", None)
    x = jax.device_put(jnp.ones((8, 6)), jax.P("d", None))
    with ignoring_materialize_warnings():
        out = jax.jit(qi.use_implicit_args(f))(w, x)
    np.testing.assert_allclose(out, 2 * expected(w).sum())


def test_shard_map_around_use_implicit_args(kind, mesh):
    f = qi.use_implicit_args(lambda w: jnp.cos(w * 2.0) + w)
    w = sharded_example(kind, "d", None)
    specs = jax.tree.map(lambda leaf: jax.P(None if leaf.shape[0] == 1 else "d", None), w)
    with ignoring_materialize_warnings():
        out = jax.jit(jax.shard_map(f, in_specs=(specs,), out_specs=jax.P("d", None)))(w)
    np.testing.assert_allclose(out, np.cos(2 * expected(w)) + expected(w), rtol=1e-6)


def test_scan_works_inside(kind, mesh):
    def f(w, xs):
        def body(w, xs):
            return jax.lax.scan(lambda c, x: (c * x, None), w, xs)[0]

        return jax.shard_map(body, in_specs=(jax.P("d", None), jax.P("d")), out_specs=jax.P("d", None))(w, xs)

    w = sharded_example(kind, "d", None)
    xs = jax.device_put(jnp.full(8, 2.0), jax.P("d"))
    with ignoring_materialize_warnings():
        out = jax.jit(qi.use_implicit_args(f))(w, xs)
    value = expected(out) if isinstance(out, kind) else out
    np.testing.assert_array_equal(value, 4 * expected(w))


def test_gradients_inside_and_around_are_those_of_dense_operands(kind, mesh):
    def loss(x, w):
        def body(x, w):
            return jax.lax.psum(jnp.sum(jnp.sin(w @ x)), "d")

        return jax.shard_map(body, in_specs=(jax.P(), jax.P("d", None)), out_specs=jax.P())(x, w)

    w = sharded_example(kind, "d", None)
    x = jnp.linspace(0, 1, 6)
    value = expected(w)
    correct = value.T @ np.cos(value @ np.asarray(x))
    with ignoring_materialize_warnings():
        np.testing.assert_allclose(jax.jit(jax.grad(qi.use_implicit_args(loss)))(x, w), correct, rtol=1e-4)
        np.testing.assert_allclose(jax.jit(qi.use_implicit_args(jax.grad(loss)))(x, w), correct, rtol=1e-4)


def test_the_function_sees_the_explicit_sharding(kind, mesh):
    seen = []

    def f(w):
        seen.append(jax.typeof(w).sharding.spec)
        return w * 2.0

    w = sharded_example(kind, "d", None)
    out = jax.jit(qi.use_implicit_args(f))(w)
    assert isinstance(out, kind)
    explicit = mesh.axis_types[0] == jax.sharding.AxisType.Explicit
    assert seen[0] == (jax.P("d", None) if explicit else jax.P(None, None))
    np.testing.assert_array_equal(np.asarray(dense(out)), 2 * expected(w))
