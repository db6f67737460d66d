"""Writes and attention outside of jit are compiled once, not at each call."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.formats import FEW

import qpaged

CONFIG = qpaged.PagedAttentionCacheMetaData(1, 2, 6, 3, 24, 8, 2, 32, 0.9)
STEP = qpaged.PagedAttentionMetadata.decode(position=[0, 9], page_table=[[0, 2], [1, 3]])
ROWS = jnp.ones((2, 2, 32))

compilations = 0


def _count(name, seconds, **_):
    global compilations
    compilations += name.endswith("backend_compile_duration")


jax.monitoring.register_event_duration_secs_listener(_count)


@pytest.mark.parametrize("quantizer", [None, *FEW])
def test_a_hundred_eager_calls_compile_as_often_as_one(quantizer):
    view = qpaged.PagedAttentionCacheView.init(None, jnp.float32, CONFIG, 0, None, quantizer)

    def step(view):
        view = view.write_decodes_to_cache(ROWS, ROWS, STEP)
        return view, qpaged.paged_attention(ROWS, view, STEP)

    start = compilations
    view, first = step(view)
    before = compilations
    assert before > start  # the event has this name still
    for _ in range(100):
        view, out = step(view)
    assert compilations == before
    np.testing.assert_array_equal(out, first)


def test_a_traced_program_has_no_call_around_the_operations():
    view = qpaged.PagedAttentionCacheView.init(None, jnp.float32, CONFIG, 0, None, "raw")
    jaxpr = jax.make_jaxpr(lambda view: view.write_decodes_to_cache(ROWS, ROWS, STEP))(view)
    names = [str(equation.params.get("name")) for equation in jaxpr.eqns]
    assert "write_slots" not in names
