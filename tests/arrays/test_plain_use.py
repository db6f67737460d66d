"""Code that takes a quantized array for a plain one gets its values, or is told what to call."""

import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.arrays import normal

import qpaged
from qpaged.arrays import quantize
from qpaged.implicit import provider

ARRAY = quantize(normal(2, 8, 4), qpaged.get_quantizer("int8:token"), (1, 1, 4))

USES = {
    "an index": lambda array: array[0],
    "iteration": list,
    "at": lambda array: array.at[0].set(1),
    "astype": lambda array: array.astype(jnp.float32),
    "a sum with a number": lambda array: array + 1,
    "a sum with an array": lambda array: jnp.ones(4) + array,
    "a product": lambda array: 2 * array,
    "a comparison": lambda array: array < 0,
    "an equation": lambda array: array == 0,
    "an inequality": lambda array: np.float32(0) != array,
    "a truth": bool,
    "a length": len,
    "a float": float,
    "an int": int,
    "a complex number": complex,
    "assignment": lambda array: operator.setitem(array, 0, 1),
    "a NumPy number": lambda array: np.float32(2) * array,
    "a NumPy array": lambda array: np.ones(4) + array,
    "negation": operator.neg,
    "plus": operator.pos,
    "inversion": operator.invert,
    "divmod": lambda array: divmod(array, 2),
    "jnp.asarray": jnp.asarray,
    "jnp.sum": jnp.sum,
    "jnp.roll": lambda array: jnp.roll(array, 1, axis=1),
    "jnp.where": lambda array: jnp.where(array, 1, 0),
    "jit without use_implicit_args": lambda array: jax.jit(lambda a: jnp.concatenate([a, a]))(array),
}


@pytest.mark.parametrize("use", USES)
def test_uses_that_need_an_implicit_program_name_it(use):
    if provider().name == "qax" and use.startswith("jnp.sum"):
        pytest.skip("JAX 0.4.35 names the class that it does not take, before it asks the class")
    with pytest.raises(
        (TypeError, AttributeError), match=r"\.materialize\(\).*step\.apply.*use_implicit_args"
    ):
        USES[use](ARRAY)


@pytest.mark.parametrize(
    ("use", "name"),
    [
        ("a sum with a number", "+"),
        ("a product", "*"),
        ("an index", "indexing"),
        ("iteration", "iteration"),
        ("a comparison", "<"),
        ("at", ".at"),
        ("jnp.asarray", "a function of jax.numpy"),
    ],
)
def test_a_use_is_called_as_it_is_written(use, name):
    with pytest.raises((TypeError, AttributeError)) as error:
        USES[use](ARRAY)
    assert str(error.value).startswith(f"{name} does not work on a quantized array here. .materialize()")


def test_numpy_gets_the_values():
    np.testing.assert_array_equal(np.asarray(ARRAY), ARRAY.materialize())
    assert np.asarray(ARRAY, np.float64).dtype == np.float64


def test_arrays_are_equal_to_themselves_alone():
    other = quantize(normal(2, 8, 4), qpaged.get_quantizer("int8:token"), (1, 1, 4))
    assert ARRAY == ARRAY and other != ARRAY and ARRAY != "x" and ARRAY is not None
    assert ARRAY in [other, ARRAY] and len({ARRAY, other}) == 2


def test_functions_of_numpy_do_not_decode_in_silence():
    with pytest.raises(TypeError, match="QuantizedArray"):
        np.exp(ARRAY)


def test_an_unknown_attribute_is_reported_as_of_any_class():
    with pytest.raises(AttributeError, match="'QuantizedArray' object has no attribute 'scale'"):
        _ = ARRAY.scale
    assert not hasattr(ARRAY, "at")
