"""Warnings and records of materialized arrays: one for each location, with the right line."""

import warnings
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from support.implicit_arrays import needs_own_implementation

import qpaged.implicit as qi


@dataclass
class Loud(qi.ImplicitArray):
    x: Any

    def materialize(self):
        return self.x


class Quiet(Loud, warn_on_materialize=False):
    pass


def warnings_of(f, *args):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        qi.use_implicit_args(f)(*args)
    return caught


array = Loud(jnp.ones(2))


def twice_on_one_line(x):
    for _ in range(3):
        y = jax.lax.sin(x)
    return jax.lax.cos(x) + y


def test_materializing_warns_on_both_lanes():
    caught = warnings_of(jax.lax.sin, array)
    assert len(caught) == 1
    assert issubclass(caught[0].category, UserWarning)
    assert issubclass(qi.MaterializeWarning, UserWarning)


def test_a_class_can_turn_its_warnings_off():
    assert warnings_of(jax.lax.sin, Quiet(jnp.ones(2))) == []


@needs_own_implementation
@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit, jax.checkpoint], ids=["plain", "jit", "checkpoint"])
def test_each_location_is_warned_about_once(wrap):
    caught = warnings_of(wrap(twice_on_one_line), array)
    assert [w.category for w in caught] == [qi.MaterializeWarning] * 2
    assert {w.filename for w in caught} == {__file__}
    first = twice_on_one_line.__code__.co_firstlineno
    assert [w.lineno - first for w in caught] == [2, 3]
    assert "'sin'" in str(caught[0].message)
    assert "Loud has no handler" in str(caught[0].message)


@needs_own_implementation
def test_a_location_in_a_loop_is_warned_about_once():
    def f(x):
        return jax.lax.scan(lambda c, _: (c + jax.lax.sin(x), None), jnp.zeros(2), length=3)[0]

    assert len(warnings_of(f, array)) == 1


@needs_own_implementation
def test_python_shows_a_location_once_by_default():
    def f(x):
        return jax.lax.sin(x)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(3):
            qi.use_implicit_args(f)(array)
    assert len(caught) == 1


@needs_own_implementation
def test_a_primitive_without_a_line_is_reported_at_the_calling_line():
    caught = warnings_of(jax.lax.sin, array)
    assert caught[0].filename == __file__


@needs_own_implementation
def test_the_warning_can_be_an_error():
    with warnings.catch_warnings():
        warnings.simplefilter("error", qi.MaterializeWarning)
        with pytest.raises(qi.MaterializeWarning, match="sin"):
            qi.use_implicit_args(jax.lax.sin)(array)


@needs_own_implementation
def test_constructing_an_array_does_not_warn():
    @dataclass
    class Outer(qi.ImplicitArray):
        inner: Any

        def materialize(self):
            return jax.lax.sin(self.inner)

    assert Outer(Loud(jnp.ones(2))).shape == (2,)


@needs_own_implementation
def test_records_hold_primitive_type_shape_and_location():
    def f(x, y):
        return jax.lax.sin(x) + jax.lax.sin(y)

    inner = jax.jit(f)
    for _ in range(2):  # the second time, the inner function is already compiled
        with qi.record_materializations() as records:
            qi.use_implicit_args(inner)(Quiet(jnp.ones(2)), Quiet(jnp.ones((3, 2))[0]))
        (record,) = records
        assert (record.primitive, record.array_type) == ("sin", "Quiet")
        assert (record.shape, record.dtype) == ((2,), jnp.float32)
        assert (record.file, record.line) == (__file__, f.__code__.co_firstlineno + 1)
        assert record.nbytes == 8
        assert str(record) == f"sin float32(2), 8 bytes, at {__file__}:{record.line}"


@pytest.mark.skipif(qi.provider().name != "qax", reason="what happens with qax")
def test_recording_with_qax_is_refused():
    with pytest.raises(NotImplementedError, match="UserWarnings only"):
        qi.record_materializations()
