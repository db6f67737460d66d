"""Some forty small programs, as people write them: each is adopted as it stands, and reads what it wrote.

Results with a quantized cache are compared with those of the program's own float cache.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from support.arrays import normal
from support.implicit_arrays import needs_own_implementation
from support.small_programs import BATCH, HEAD_DIM, HEADS, PROGRAMS

from qpaged import adopt

pytestmark = needs_own_implementation
EXACT = [name for name, program in PROGRAMS.items() if program.keeps_exact]


def check_it_reads_what_it_wrote(program, quantizer, bound):
    """Nothing is decoded as a whole, and results differ from those with floats by no more than ``bound``."""
    inputs = normal(3, BATCH, program.tokens, 3, HEADS, HEAD_DIM)
    example = (inputs[0], jnp.int32(0), program.cache())
    step = adopt.quantize_cache(program.step, quantizer, example=example, page_size=8, strict=True)
    assert {leaf.role for leaf in step.found.leaves} in ({"key", "value"}, {"key and value"})

    def run(step, cache):
        def body(cache, xs):
            out, cache = step(*xs, cache)
            return cache, out

        return lax.scan(body, cache, (inputs, jnp.arange(3, dtype=jnp.int32) * program.tokens))

    _, want = jax.jit(lambda cache: run(program.step, cache))(program.cache())
    before = step.init(program.cache())
    after, got = jax.jit(lambda cache: run(step, cache))(before)
    assert jax.tree_util.tree_structure(before) == jax.tree_util.tree_structure(after)
    want = np.asarray(want, np.float32)
    assert np.linalg.norm(np.asarray(got, np.float32) - want) < bound * np.linalg.norm(want)
    assert not step.report()


@pytest.mark.short(12)
@pytest.mark.parametrize("name", PROGRAMS)
def test_it_reads_what_it_wrote(name):
    program = PROGRAMS[name]
    check_it_reads_what_it_wrote(program, program.quantizer, bound=0.03)


@pytest.mark.short(10)
@pytest.mark.parametrize("name", EXACT)
def test_beside_exact_pages_it_reads_new_tokens_as_they_were_written(name):
    program = PROGRAMS[name]
    check_it_reads_what_it_wrote(program, f"{program.quantizer}+exact8+sink8", bound=1e-6)
