"""What programs written for qax do, and find here: each of these ran with qax."""

import warnings
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.implicit_arrays import needs_own_implementation

import qpaged.implicit as qi

pytestmark = needs_own_implementation


@dataclass
class Filled(qi.ImplicitArray):
    """Has one value everywhere."""

    value: Any

    def materialize(self):
        return jnp.full(self.shape, self.value, self.dtype)


@dataclass
class Boxed(qi.ImplicitArray):
    """Is a dense array."""

    inner: Any

    def materialize(self):
        return self.inner


@qi.primitive_handler("mul")
def _(primitive, left: Filled, right: Filled):
    return Filled(left.value * right.value, shape=left.shape, dtype=left.dtype)


@qi.primitive_handler("add")
def _(primitive, left: Boxed, right: jax.Array):
    return Boxed(left.inner + right)


@qi.primitive_handler("reduce_sum")
def _(primitive, array: Boxed, **params):
    return Boxed(qi.default_handler(primitive, array.inner, **params))


def filled(value, shape=(2,)):
    return Filled(value, shape=shape, dtype=jnp.float32)


@pytest.mark.filterwarnings("ignore::qpaged.implicit.MaterializeWarning")
def test_stacked_children_have_the_shape_of_one_that_is_given():
    rows = filled(jnp.arange(3.0), shape=(2, 5))
    np.testing.assert_array_equal(jax.vmap(qi.use_implicit_args(jnp.sum))(rows), [0, 10, 20])


@pytest.mark.parametrize("predicate", [True, False])
def test_of_what_branches_return_only_children_that_differ_become_dense(predicate):
    dense, nested = filled(jnp.float32(2)), filled(filled(jnp.float32(3), shape=()))

    def f(predicate, dense, nested):
        return jax.lax.cond(predicate, lambda: nested * nested, lambda: dense * dense)

    with warnings.catch_warnings(), qi.record_materializations() as records:
        warnings.simplefilter("ignore", qi.MaterializeWarning)
        product = qi.use_implicit_args(f)(predicate, dense, nested)
    assert isinstance(product, Filled) and isinstance(product.value, jax.Array)
    assert product.value == (9 if predicate else 4)
    assert {record.shape for record in records} == {()}


@pytest.mark.parametrize("second", [filled(jnp.ones(2)), Boxed(jnp.ones(2))])
def test_outputs_of_several_classes_or_with_children_of_several_shapes_are_dense(second):
    first = filled(1.0)

    def f(first, second):
        return jax.lax.cond(jnp.array(True), lambda: first, lambda: second)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", qi.MaterializeWarning)
        out = qi.use_implicit_args(f)(first, second)
    assert isinstance(out, jax.Array)
    np.testing.assert_array_equal(out, [1, 1])


@pytest.mark.parametrize("reverse", [False, True])
def test_a_scan_that_makes_its_carry_implicit_returns_an_implicit_array(reverse):
    def total(xs):
        return jax.lax.scan(lambda total, x: (jnp.sum(x + total), total), 0.0, xs, reverse=reverse)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", qi.MaterializeWarning)
        result, partial = qi.use_implicit_args(total)(Boxed(jnp.arange(4.0)[:, None]))
    want, want_partial = total(jnp.arange(4.0)[:, None])
    assert isinstance(result, Boxed) and result.inner == want
    np.testing.assert_array_equal(partial, want_partial)


def test_a_handler_of_a_primitive_that_jax_has_removed_is_warned_of():
    with pytest.warns(UserWarning, match="no primitive 'random_gamma_grad' any more"):
        qi.primitive_handler("random_gamma_grad")(lambda primitive, a: a)


class Silent(Boxed, warn_on_materialize=False):
    """A class that is never warned about."""


@pytest.mark.filterwarnings("ignore::qpaged.implicit.MaterializeWarning")
def test_a_compiled_inner_function_repeats_the_reports_of_the_class_that_it_is_given():
    inner = jax.jit(jnp.cos)

    def records_of(array):
        with warnings.catch_warnings(record=True) as seen, qi.record_materializations() as records:
            warnings.simplefilter("always")
            qi.use_implicit_args(lambda x: inner(x))(array)
        return len(seen), [record.array_type for record in records]

    for _ in range(2):  # traced, and from the cache
        assert records_of(Boxed(jnp.ones(3))) == (1, ["Boxed"])
        assert records_of(Silent(jnp.ones(3))) == (0, ["Silent"])


def test_children_that_do_not_fit_are_refused():
    @dataclass
    class Long(qi.ImplicitArray, warn_on_materialize=False):
        value: jax.Array

        def materialize(self):
            return jnp.reshape(self.value, (7,))

    Long(jnp.ones((3, 7)), shape=(7,), dtype=jnp.float32)  # a stack of three
    Long(jnp.ones((2, 3, 7)), shape=(7,), dtype=jnp.float32)
    with pytest.raises(TypeError, match="reshape"):
        Long(jnp.ones(2), shape=(7,), dtype=jnp.float32)
