"""Where a step decodes its cache: the report names the lines of the model."""

import inspect

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from qpaged.adopt import quantize_cache

LENGTH = 32
CACHE = (jnp.zeros((2, LENGTH, 16)), jnp.zeros((2, LENGTH, 16)))


def step(x, position, cache):
    keys, values = (lax.dynamic_update_slice(array, x, (0, position, 0)) for array in cache)
    seen = jnp.arange(LENGTH)[:, None] <= position
    zeroed = jnp.where(seen, values, 0)
    scores = jax.nn.softmax(jnp.einsum("btd,bsd->bts", x, keys))
    return jnp.einsum("bts,bsd->btd", scores, zeroed), (keys, values)


@pytest.mark.filterwarnings("ignore")
def test_what_functions_of_jax_decode_is_reported_at_their_call():
    run = quantize_cache(step, "int8", example=(jnp.ones((2, 1, 16)), jnp.int32(0), CACHE))
    (place,) = run.report()
    lines, first = inspect.getsourcelines(step)
    called = first + next(at for at, line in enumerate(lines) if "jnp.where" in line)
    assert (place.primitive, place.file, place.line) == ("select_n", __file__, called)
