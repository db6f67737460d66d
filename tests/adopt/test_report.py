"""The report names the lines of the model that decode its cache."""

import inspect
import pickle

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from qpaged.adopt import MaterializeError, quantize_cache

LENGTH = 32
CACHE = (jnp.zeros((2, LENGTH, 16)), jnp.zeros((2, LENGTH, 16)))


def step(x, position, cache):
    keys = lax.dynamic_update_slice(cache[0], x, (0, position, 0))
    values = lax.dynamic_update_slice(cache[1], x, (0, position, 0))
    scores = jax.nn.softmax(jnp.einsum("btd,bsd->bts", x, keys))
    return jnp.einsum("bts,bsd->btd", scores, jax.nn.silu(values)), (keys, values)


@pytest.mark.filterwarnings("ignore")
def test_decoding_inside_a_function_of_jax_is_reported_at_its_call():
    run = quantize_cache(step, "int8", example=(jnp.ones((2, 1, 16)), jnp.int32(0), CACHE))
    (place,) = run.report()
    lines, first_line = inspect.getsourcelines(step)
    (silu_line,) = [first_line + offset for offset, line in enumerate(lines) if "silu" in line]
    assert (place.primitive, place.file, place.line) == ("logistic", __file__, silu_line)


@pytest.mark.filterwarnings("ignore")
def test_the_report_says_what_ran_last():
    run = quantize_cache(step, "int8", example=(jnp.ones((2, 1, 16)), jnp.int32(0), CACHE))
    part = run.restrict(step, run.found)
    for cache, words in ((CACHE, "not quantized"), (run.init(CACHE), "2 of 2 arrays")):
        part(jnp.ones((2, 1, 16)), jnp.int32(0), cache)
        assert words in str(run.report()) and words in str(part.report())
    copied = pickle.loads(pickle.dumps(run.report()))
    assert str(copied) == str(run.report())


def squashed_step(x, position, cache):
    """Attend to the rows beside the new one, whose keys are squashed after they are joined."""
    keys, values = (jnp.concatenate([array, x], axis=1) for array in cache)
    scores = jnp.einsum("btd,bsd->bts", x, jnp.tanh(keys))
    out = jnp.einsum("bts,bsd->btd", jax.nn.softmax(scores), values)
    written = [lax.dynamic_update_slice(array, x, (0, position, 0)) for array in cache]
    return out, tuple(written)


@pytest.mark.filterwarnings("ignore")
def test_a_cache_that_is_decoded_after_rows_were_joined_to_it_is_reported():
    arguments = jnp.ones((2, 1, 16)), jnp.int32(0), CACHE
    run = quantize_cache(squashed_step, "int8", example=arguments)
    (place,) = run.report()
    lines, first_line = inspect.getsourcelines(squashed_step)
    (line,) = [first_line + offset for offset, text in enumerate(lines) if "jnp.tanh" in text]
    assert (place.shape, place.file, place.line) == ((2, LENGTH + 1, 16), __file__, line)
    with pytest.raises(MaterializeError, match="must not dequantize"):
        quantize_cache(squashed_step, "int8", example=arguments, strict=True)
