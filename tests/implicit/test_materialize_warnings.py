"""What materializing says: once per place, where, and to whom."""

import warnings
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from support.implicit_arrays import ours

import qpaged.implicit as qi


@dataclass
class Loud(qi.ImplicitArray):
    x: Any

    def materialize(self):
        return self.x


class Quiet(Loud, warn_on_materialize=False):
    pass


def told(f, *args, action="always"):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter(action)
        qi.use_implicit_args(f)(*args)
    return caught


array = Loud(jnp.ones(2))


def twice_on_one_line(x):
    for _ in range(3):
        y = jax.lax.sin(x)
    return jax.lax.cos(x) + y


def test_it_is_a_warning_on_both_lanes():
    caught = told(jax.lax.sin, array)
    assert len(caught) == 1
    assert issubclass(caught[0].category, UserWarning)
    assert issubclass(qi.MaterializeWarning, UserWarning)


def test_a_class_can_be_silent():
    assert told(jax.lax.sin, Quiet(jnp.ones(2))) == []


@ours
@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit, jax.checkpoint], ids=["plain", "jit", "checkpoint"])
def test_once_per_place(wrap):
    caught = told(wrap(twice_on_one_line), array)
    assert [w.category for w in caught] == [qi.MaterializeWarning] * 2
    assert {w.filename for w in caught} == {__file__}
    first = twice_on_one_line.__code__.co_firstlineno
    assert [w.lineno - first for w in caught] == [2, 3]
    assert "'sin'" in str(caught[0].message)
    assert "Loud has no handler" in str(caught[0].message)


@ours
def test_once_per_place_in_a_loop():
    def f(x):
        return jax.lax.scan(lambda c, _: (c + jax.lax.sin(x), None), jnp.zeros(2), length=3)[0]

    assert len(told(f, array)) == 1


@ours
def test_python_shows_a_place_once_by_default():
    def f(x):
        return jax.lax.sin(x)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(3):
            qi.use_implicit_args(f)(array)
    assert len(caught) == 1


@ours
def test_where_no_line_of_the_program_is_known():
    caught = told(jax.lax.sin, array)
    assert caught[0].filename == __file__


@ours
def test_it_can_be_an_error():
    with warnings.catch_warnings():
        warnings.simplefilter("error", qi.MaterializeWarning)
        with pytest.raises(qi.MaterializeWarning, match="sin"):
            qi.use_implicit_args(jax.lax.sin)(array)


@ours
def test_making_an_array_says_nothing():
    @dataclass
    class Outer(qi.ImplicitArray):
        inner: Any

        def materialize(self):
            return jax.lax.sin(self.inner)

    assert Outer(Loud(jnp.ones(2))).shape == (2,)


@ours
def test_record():
    def f(x, y):
        return jax.lax.sin(x) + jax.lax.sin(y)

    inner = jax.jit(f)
    for _ in range(2):  # the second time, the inner function is compiled already
        with qi.record_materializations() as records:
            qi.use_implicit_args(inner)(Quiet(jnp.ones(2)), Quiet(jnp.ones((3, 2))[0]))
        (record,) = records
        assert (record.primitive, record.array_type) == ("sin", "Quiet")
        assert (record.shape, record.dtype) == ((2,), jnp.float32)
        assert (record.file, record.line) == (__file__, f.__code__.co_firstlineno + 1)


@pytest.mark.skipif(qi.provider().name != "qax", reason="what happens with qax")
def test_no_record_with_qax():
    with pytest.raises(NotImplementedError, match="UserWarnings only"):
        qi.record_materializations()
