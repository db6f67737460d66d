"""Implicit arrays through loops and branches."""

import warnings
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name
from support.implicit_arrays import KINDS, dense, example, needs_own_implementation

import qpaged.implicit as qi
from qpaged._platforms import by_platform

pytestmark = [pytest.mark.parametrize("kind", KINDS), needs_own_implementation]


@pytest.fixture(params=["eager", "jit"])
def run(request):
    def call(f, *args):
        f = qi.use_implicit_args(f)
        return (jax.jit(f) if request.param == "jit" else f)(*args)

    return call


def test_a_scan_carry_stays_implicit(kind, run):
    def f(w, xs):
        return jax.lax.scan(lambda w, x: (w * x, jnp.float32(0)), w, xs)[0]

    out = run(f, example(kind), jnp.array([2.0, 0.5, 4.0]))
    assert isinstance(out, kind)
    np.testing.assert_array_equal(dense(out), 4 * dense(example(kind)))


@pytest.mark.parametrize("length", [0, 1])
def test_scans_of_no_steps_and_of_one_give_what_plain_arrays_give(kind, run, length):
    def over_xs(w, xs):
        return jax.lax.scan(lambda c, x: (c + x, w * x), jnp.float32(0), xs)

    w, xs = example(kind), jnp.arange(length, dtype=jnp.float32)
    carry, ys = run(over_xs, w, xs)
    want_carry, want_ys = over_xs(dense(w), xs)
    assert carry == want_carry
    np.testing.assert_array_equal(dense(ys), want_ys)
    kept, _ = run(lambda w, xs: jax.lax.scan(lambda w, x: (w * x, x), w, xs), w, 1 + xs)
    assert isinstance(kept, kind)
    np.testing.assert_array_equal(dense(kept), dense(w))


def test_a_scan_carry_that_the_body_writes_into_stays_implicit(kind, run):
    def f(w, rows):
        def body(w, row):
            return jax.lax.dynamic_update_slice(w, row[None], (2, 0)), None

        return jax.lax.scan(body, w, rows)[0]

    out = run(f, example(kind), jnp.arange(6.0).reshape(2, 3))
    assert isinstance(out, kind)
    np.testing.assert_array_equal(out.codes[2], [3, 4, 5])


def test_scan_slices_implicit_xs_and_stacks_implicit_ys(kind, run):
    shapes = []

    def f(stack):
        def body(total, w):
            shapes.append(w.shape)
            return total + jnp.float32(1), w * 2.0

        return jax.lax.scan(body, jnp.float32(0), stack)

    w = example(kind)
    stack = kind(jnp.stack([w.codes, -w.codes]), jnp.stack([w.scale, w.scale]))
    total, out = run(f, stack)
    assert set(shapes) == {(4, 3)}
    assert isinstance(out, kind)
    assert out.shape == (2, 4, 3)
    assert total == 2
    np.testing.assert_array_equal(dense(out), 2 * dense(stack))


def test_a_scan_body_closes_over_an_implicit_array(kind, run):
    def f(w, xs):
        return jax.lax.scan(lambda c, x: (c + jnp.sum((w * x) + 0.0), None), jnp.float32(0), xs)[0]

    with warnings.catch_warnings(action="ignore"):
        out = run(f, example(kind), jnp.array([1.0, 2.0]))
    np.testing.assert_allclose(out, 3 * dense(example(kind)).sum())


def test_scan_keeps_reverse_and_unroll(kind, run):
    def f(w, xs):
        def body(w, x):
            return w * x, x

        return jax.lax.scan(body, w, xs, reverse=True, unroll=2)

    out, ys = run(f, example(kind), jnp.array([2.0, 0.5, 4.0]))
    assert isinstance(out, kind)
    np.testing.assert_array_equal(ys, [2.0, 0.5, 4.0])


def test_a_scan_carry_that_changes_layout_is_materialized(kind, run):
    def f(w, v, xs):
        return jax.lax.scan(lambda c, x: ((c[0] + 1.0, c[1] * x), None), (w, v), xs)[0]

    with qi.record_materializations() as records, warnings.catch_warnings(action="ignore"):
        changed, kept = run(f, example(kind), example(kind), jnp.array([2.0, 3.0]))
    assert isinstance(changed, jax.Array)
    assert isinstance(kept, kind)
    np.testing.assert_array_equal(changed, dense(example(kind)) + 2)
    np.testing.assert_array_equal(dense(kept), 6 * dense(example(kind)))
    assert [record.primitive for record in records] == ["scan"]


def test_xs_whose_leaves_cannot_be_sliced_are_materialized(kind, run):
    def f(w):
        return jax.lax.scan(lambda c, row: (c + row, None), jnp.zeros(3), w)[0]

    with qi.record_materializations() as records, warnings.catch_warnings(action="ignore"):
        out = run(f, example(kind))
    np.testing.assert_array_equal(out, dense(example(kind)).sum(0))
    assert {record.primitive for record in records} == {"scan"}


@dataclass
class Product(qi.ImplicitArray):
    a: Any
    b: Any

    def materialize(self):
        return self.a @ self.b.T


@dataclass
class Transposed(qi.ImplicitArray):
    x: Any

    def materialize(self):
        return self.x.T


@pytest.mark.parametrize("square", [lambda x: Product(x, x + 1), Transposed], ids=["product", "transposed"])
def test_square_xs_whose_slices_only_have_the_right_shape_are_materialized(kind, run, square):
    w = square(jnp.arange(9.0).reshape(3, 3))
    with pytest.warns(qi.MaterializeWarning, match="scan"):
        _, rows = run(lambda w: jax.lax.scan(lambda c, row: (c, row + 0.0), 0.0, w), w)
    np.testing.assert_array_equal(rows, w.materialize())


def test_while_takes_implicit_carries_and_constants(kind, run):
    def f(w, v, limit):
        def cond(c):
            return jnp.logical_and(c[0] < 3, jnp.sum(limit * 1.0) < 1e6)

        def body(c):
            return c[0] + 1, c[1] * 2.0, c[2] + jnp.sum(jnp.cos(v))

        return jax.lax.while_loop(cond, body, (0, w, jnp.float32(0)))

    with warnings.catch_warnings(action="ignore"):
        n, out, total = run(f, example(kind), example(kind), example(kind))
    assert n == 3
    assert isinstance(out, kind)
    np.testing.assert_array_equal(dense(out), 8 * dense(example(kind)))
    np.testing.assert_allclose(total, 3 * jnp.cos(dense(example(kind))).sum(), rtol=1e-6)


def test_a_fori_loop_carry_stays_implicit(kind, run):
    out = run(lambda w: jax.lax.fori_loop(0, 3, lambda i, w: w * 2.0, w), example(kind))
    assert isinstance(out, kind)
    np.testing.assert_array_equal(dense(out), 8 * dense(example(kind)))


@pytest.mark.parametrize("predicate", [False, True])
def test_an_output_on_which_branches_agree_stays_implicit(kind, run, predicate):
    out = run(
        lambda p, w: jax.lax.cond(p, lambda w: w * 2.0, lambda w: -w, w), jnp.array(predicate), example(kind)
    )
    assert isinstance(out, kind)
    np.testing.assert_array_equal(dense(out), dense(example(kind)) * (2 if predicate else -1))


@pytest.mark.parametrize("index", [0, 1, 2])
def test_an_output_on_which_branches_differ_is_dense(kind, run, index):
    def f(i, w):
        branches = [lambda w: (w, w * 2.0), lambda w: (jnp.cos(w), -w), lambda w: (jnp.zeros(w.shape), w)]
        return jax.lax.switch(i, branches, w)

    w = example(kind)
    with warnings.catch_warnings(action="ignore"):
        differing, agreeing = run(f, jnp.array(index), w)
    assert isinstance(differing, jax.Array)
    assert isinstance(agreeing, kind)
    expected = [dense(w), jnp.cos(dense(w)), jnp.zeros(w.shape)][index]
    np.testing.assert_allclose(differing, expected, rtol=1e-6)
    np.testing.assert_array_equal(dense(agreeing), dense(w) * [2, -1, 1][index])


def test_platform_dependent_takes_the_branch_of_the_platform(kind, run):
    def f(w):
        return jax.lax.platform_dependent(w, cpu=lambda w: w * 2.0, default=lambda w: -w)

    out = run(f, example(kind))
    assert isinstance(out, kind)
    np.testing.assert_array_equal(dense(out), 2 * dense(example(kind)))


def test_by_platform_uses_the_default_for_implicit_operands(kind, run):
    def f(w):
        return by_platform(w, default=lambda w: w * 2.0, tpu=lambda w: -w)

    out = run(f, example(kind))
    assert isinstance(out, kind)
    np.testing.assert_array_equal(dense(out), 2 * dense(example(kind)))


def test_a_loop_in_a_branch_in_a_loop_keeps_its_carry_implicit(kind, run):
    def f(w, flags):
        def body(w, flag):
            def loop(w):
                return jax.lax.fori_loop(0, 2, lambda i, w: w * 2.0, w)

            return jax.lax.cond(flag, loop, lambda w: -w, w), None

        return jax.lax.scan(body, w, flags)[0]

    out = run(f, example(kind), jnp.array([True, False, True]))
    assert isinstance(out, kind)
    np.testing.assert_array_equal(dense(out), -16 * dense(example(kind)))


def test_barriers_and_names_return_implicit_arrays(kind, run):
    def f(w):
        w = checkpoint_name(w, "cache")
        w, _ = jax.lax.optimization_barrier((w, jnp.float32(1)))
        return w

    assert isinstance(run(f, example(kind)), kind)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("length", [1, 3])
def test_a_carry_that_the_first_iteration_makes_implicit_is_implicit_from_then_on(kind, run, length, reverse):
    def over_xs(w, xs):
        def body(carry, x):
            count, _ = carry
            return (count + 1, w * (x + count)), (x, w * x)

        return jax.lax.scan(body, (0.0, jnp.zeros(w.shape)), xs, reverse=reverse)

    w, xs = example(kind), 1 + jnp.arange(length, dtype=jnp.float32)
    with qi.record_materializations() as records:
        (count, product), (same, products) = run(over_xs, w, xs)
    (_, want), (_, want_products) = over_xs(dense(w), xs)
    assert isinstance(product, kind) and isinstance(products, kind) and not records
    assert count == length
    np.testing.assert_array_equal(dense(product), want)
    np.testing.assert_array_equal(same, xs)
    np.testing.assert_array_equal(jax.vmap(dense)(products), want_products)
