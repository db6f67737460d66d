"""Dispatch to handlers: which one is called, with what, and what it may return."""

from dataclasses import dataclass
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.implicit_arrays import needs_own_implementation

import qpaged.implicit as qi


@dataclass
class Parent(qi.ImplicitArray, warn_on_materialize=False):
    x: Any

    def materialize(self):
        return self.x


class Child(Parent, warn_on_materialize=False):
    pass


class Fixed(Parent, commute_ops=False, warn_on_materialize=False):
    pass


@pytest.fixture
def fresh():
    """Return a class and a subclass of it that no other test has registered handlers for."""

    class A(Parent, warn_on_materialize=False):
        pass

    class B(A, warn_on_materialize=False):
        pass

    return A, B


def call(primitive, *args):
    return qi.use_implicit_args(primitive)(*args)


ones = jnp.ones(2)


def test_the_handler_of_the_most_specific_class_is_called(fresh):
    A, B = fresh

    @qi.primitive_handler("sin")
    def _(primitive, x: A, **params):
        return x.x * 0 + 1

    @qi.primitive_handler("sin")
    def _(primitive, x: B, **params):
        return x.x * 0 + 2

    assert call(jax.lax.sin, A(ones))[0] == 1
    assert call(jax.lax.sin, B(ones))[0] == 2


def test_precedence_decides_between_equally_specific_handlers(fresh):
    A, B = fresh

    @qi.primitive_handler("atan2", precedence=1)
    def _(primitive, x: B, y: A, **params):
        return x.x * 0 + 1

    @qi.primitive_handler("atan2")
    def _(primitive, x: A, y: B, **params):
        return x.x * 0 + 2

    assert call(jax.lax.atan2, B(ones), B(ones))[0] == 1


@needs_own_implementation
def test_an_ambiguity_names_both_handlers(fresh):
    A, B = fresh

    @qi.primitive_handler("atan2")
    def left(primitive, x: B, y: A, **params):
        return x.x

    @qi.primitive_handler("atan2")
    def right(primitive, x: A, y: B, **params):
        return x.x

    with pytest.raises(TypeError, match=r"left.*right.*atan2\(B, B\) equally well"):
        call(jax.lax.atan2, B(ones), B(ones))


def test_not_implemented_materializes_the_operand(fresh):
    A, _ = fresh

    @qi.primitive_handler("cos")
    def _(primitive, x: A, **params):
        return NotImplemented

    np.testing.assert_array_equal(call(jax.lax.cos, A(ones)), jnp.cos(ones))


@needs_own_implementation
@pytest.mark.parametrize(
    "annotation", [jax.Array, qi.ArrayValue, Any, jax.Array | qi.ArrayValue, Annotated[jax.Array, "dense"]]
)
@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_annotations_fit_traced_values(fresh, annotation, wrap):
    A, _ = fresh

    @qi.primitive_handler("sub")
    def _(primitive, x: annotation, y: A, **params):
        return A(qi.default_handler(primitive, x, y.x, **params))

    assert isinstance(wrap(qi.use_implicit_args(jax.lax.sub))(ones, A(ones)), A)


@needs_own_implementation
def test_a_handler_whose_annotation_does_not_fit_is_not_called(fresh):
    A, B = fresh

    @qi.primitive_handler("sub")
    def _(primitive, x: jax.Array, y: B, **params):
        raise AssertionError

    np.testing.assert_array_equal(call(jax.lax.sub, A(ones), B(ones)), jnp.zeros(2))


def test_a_handler_may_take_any_number_of_operands(fresh):
    A, _ = fresh

    @qi.primitive_handler("clamp")
    def _(primitive, *operands: Any, **params):
        parts = [o.x if isinstance(o, A) else o for o in operands]
        return A(qi.default_handler(primitive, *parts, **params))

    assert isinstance(call(lambda a, b: jax.lax.clamp(a, b, a), A(ones), ones), A)


def test_one_handler_may_serve_several_primitives_by_name_or_object(fresh):
    A, _ = fresh

    @qi.primitive_handler(["exp", jax.lax.log_p])
    def _(primitive, x: A, **params):
        return A(qi.default_handler(primitive, x.x, **params))

    for f in (jax.lax.exp, jax.lax.log):
        assert isinstance(call(f, A(ones)), A)


@pytest.mark.parametrize("operation", ["add", "mul", "max", "min"])
def test_commutative_operands_are_swapped_to_put_the_implicit_one_first(fresh, operation):
    A, _ = fresh

    @qi.primitive_handler(operation)
    def _(primitive, x: A, y: Any, **params):
        return A(qi.default_handler(primitive, x.x, y, **params))

    assert isinstance(call(getattr(jax.lax, operation), ones, A(ones)), A)


def test_operands_are_not_swapped_with_commute_ops_off():
    seen = []

    @qi.primitive_handler("mul")
    def _(primitive, x: qi.ArrayValue, y: Fixed, **params):
        seen.append(type(x))
        return NotImplemented

    call(jax.lax.mul, ones, Fixed(ones))
    assert len(seen) == 1
    assert not issubclass(seen[0], Fixed)


@needs_own_implementation
def test_handlers_get_constants_as_jax_arrays(fresh):
    A, _ = fresh
    seen = []

    @qi.primitive_handler("add")
    def _(primitive, x: A, y: Any, **params):
        seen.append((isinstance(y, jax.Array), y.dtype))
        return NotImplemented

    table = np.arange(2, dtype=np.float32)
    call(lambda x: x + table + np.float32(2) + 1.0, A(ones))
    assert seen[0] == (True, jnp.float32)
    call(lambda x: x + 1.0, A(ones))
    assert seen[-1] == (True, jnp.float32)


def test_registering_a_signature_again_replaces_the_handler(fresh):
    A, _ = fresh
    for answer in (1.0, 2.0):

        @qi.primitive_handler("tanh")
        def _(primitive, x: A, *, answer=answer, **params):
            return x.x * 0 + answer

    assert call(jax.lax.tanh, A(ones))[0] == 2


@needs_own_implementation
def test_an_unknown_primitive_is_refused_by_name():
    with pytest.raises(ValueError, match=r"'addd'.*jax\.lax without the trailing '_p'"):
        qi.primitive_handler("addd")


@needs_own_implementation
def test_an_annotation_that_is_not_a_class_is_refused():
    with pytest.raises(TypeError, match=r"argument 'x' of .* is annotated with list\[int\]"):

        @qi.primitive_handler("sin")
        def _(primitive, x: list[int]):
            pass


@needs_own_implementation
def test_a_handler_without_positional_arguments_is_refused():
    with pytest.raises(TypeError, match="takes no positional arguments"):

        @qi.primitive_handler("sin")
        def _(**params):
            pass


@needs_own_implementation
def test_a_parameter_that_the_handler_does_not_take_is_named(fresh):
    A, _ = fresh

    @qi.primitive_handler("reduce_sum")
    def _(primitive, x: A):
        pass

    with pytest.raises(TypeError, match=r"parameter 'axes' \(\(0,\)\).*add \*\*params"):
        call(jnp.sum, A(ones))


@needs_own_implementation
def test_a_handler_that_returns_a_wrong_shape_is_refused(fresh):
    A, _ = fresh

    @qi.primitive_handler("sin")
    def _(primitive, x: A, **params):
        return jnp.zeros((5,))

    with pytest.raises(TypeError, match=r"'sin' returned .* of shape \(5,\), where \(2,\) is expected"):
        call(jax.lax.sin, A(ones))


@needs_own_implementation
def test_a_handler_that_returns_one_result_instead_of_a_list_is_refused(fresh):
    A, _ = fresh

    @qi.primitive_handler("sort")
    def _(primitive, x: A, **params):
        return x

    with pytest.raises(TypeError, match=r"'sort' returned a A.*return a list"):
        call(jnp.sort, A(ones))


@needs_own_implementation
def test_a_handler_that_returns_a_wrong_number_of_results_is_refused(fresh):
    A, _ = fresh

    @qi.primitive_handler("sort")
    def _(primitive, x: A, **params):
        return []

    with pytest.raises(TypeError, match="'sort' returned 0 values, where 1 are expected"):
        call(jnp.sort, A(ones))
