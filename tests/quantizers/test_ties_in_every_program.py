"""Values beside the ties of the formats that round to nearest: every program gives them the same codes.

A compiler may turn a division into a product with a reciprocal, in one program and not in another; the
quotients differ in their last bit, which tells ties apart.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.arrays import leaves_equal
from support.formats import BUILT_IN

import qpaged

SLOTS, HEADS, HEAD_DIM, PAGES = 16, 2, 64, 4
TOKENS = SLOTS * PAGES
VIEW = qpaged.PagedAttentionCacheView
CONFIG = qpaged.PagedAttentionCacheMetaData(1, 1, PAGES, PAGES, TOKENS, SLOTS, HEADS, HEAD_DIM, 0.5)
# The ratio of a block's largest magnitude to the step between its ties.
STEPS = {"int8:token": 127.0, "int4+offset": 7.5}


def beside_ties(steps):
    """(tokens, heads, head_dim) float32: of each group of 32 one largest magnitude, the rest beside ties."""
    rng = np.random.default_rng(0)
    largest = rng.uniform(1, 2, (TOKENS, HEADS, HEAD_DIM // 32, 1))
    largest[..., 1:, :] = largest[..., :1, :]  # the same scale by token
    largest = largest.astype(np.float32)
    step = (largest / np.float32(steps)).astype(np.float32)
    places = rng.integers(-int(steps), int(steps), (*largest.shape[:-1], 30)) + np.float32(0.5)
    near = (places * step).astype(np.float32)
    near = (near.view(np.int32) + rng.integers(-2, 3, near.shape).astype(np.int32)).view(np.float32)
    return np.concatenate([largest, -largest, near], axis=-1).reshape(TOKENS, HEADS, HEAD_DIM)


def written(view, rows):
    metadata = qpaged.PagedAttentionMetadata.prefill(
        position=jnp.arange(TOKENS), page_table=jnp.arange(PAGES)
    )
    return view.write_prefill_to_cache(rows, -rows, metadata)


def one_by_one(view, rows):
    def step(token, view):
        row = jax.lax.dynamic_slice_in_dim(rows, token, 1)
        metadata = qpaged.PagedAttentionMetadata.decode(
            position=token[None], page_table=jnp.arange(PAGES, dtype=jnp.int32)[None]
        )
        return view.write_decodes_to_cache(row, -row, metadata)

    return jax.lax.fori_loop(jnp.int32(0), jnp.int32(TOKENS), step, view)


def pages_of(rows):
    """(tokens, heads, head_dim) as (heads, pages, slots, head_dim)."""
    return jnp.swapaxes(jnp.asarray(rows), 0, 1).reshape(HEADS, PAGES, SLOTS, HEAD_DIM)


def parts(array):
    """Codes and what goes with them, however they are stored."""
    return array.codes, *array.parts


@pytest.mark.parametrize("spelling", ["int8:token", pytest.param("int4+offset", marks=pytest.mark.long)])
def test_every_program_gives_the_same_codes(spelling):
    rows = beside_ties(STEPS[spelling])
    view = VIEW.init(None, jnp.float32, CONFIG, 0, None, spelling)
    quantizer = qpaged.get_quantizer(spelling)
    whole = parts(jax.jit(written)(view, rows).key_pages)
    programs = {
        "one by one": lambda: jax.jit(one_by_one)(view, rows).key_pages,
        "quantize": lambda: jax.jit(quantizer.quantize)(pages_of(rows)),
        "quantize, a block alone": lambda: jax.jit(
            lambda x: jax.lax.map(lambda token: quantizer.quantize(token[None]), x.reshape(-1, HEAD_DIM))
        )(pages_of(rows)),
        "eager write": lambda: written(view, rows).key_pages,
    }
    for name, program in programs.items():
        got = jax.tree_util.tree_map(lambda a, b: a.reshape(b.shape), parts(program()), whole)
        differ = int((np.asarray(got[0]) != np.asarray(whole[0])).sum())
        assert leaves_equal(got, whole), f"{name}: {differ} codes differ from those of one prefill"


def test_the_values_tell_a_division_from_a_product():
    rows = beside_ties(127.0)
    scale = np.abs(rows).max(axis=-1, keepdims=True) * np.float32(1 / 127)
    assert (np.rint(rows / scale) != np.rint(rows * (1 / scale))).sum() > 10


@pytest.mark.short(40)
@pytest.mark.parametrize("spelling", BUILT_IN)
def test_scales_are_the_same_in_every_program(spelling):
    """A compiler may fuse a product and a sum, with one rounding for two, in some programs only."""
    quantizer = qpaged.get_quantizer(spelling)
    if quantizer.scale_dtype is None:
        return
    rng = np.random.default_rng(0)
    ends = rng.normal(size=(2, 50_000)).astype(jnp.bfloat16).astype(np.float32)
    low, high = jnp.asarray(ends.min(0)), jnp.asarray(ends.max(0))
    for format in {quantizer, quantizer.of_whole_blocks}:
        np.testing.assert_array_equal(jax.jit(format.fit)(low, high), format.fit(low, high))
