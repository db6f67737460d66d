"""A model's own cache with exact pages: the newest tokens and the first are read as they were written."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from support.arrays import normal
from support.implicit_arrays import needs_own_implementation
from support.long import first_short

from qpaged import adopt

pytestmark = needs_own_implementation
BATCH, LENGTH, HEADS, HEAD_DIM, PAGE = 2, 64, 2, 32, 8
FORMATS = first_short(
    2,
    [
        "int4:channel+offset+exact1+sink8/int4:token+rotate+exact1+sink8",
        "int8+exact17+sink3",
        "int4+rotate+exact9",
        "fp8_e4m3+exact1",
        "mxfp8+exact9",
        "raw+exact9",
    ],
)


def attend(x, positions, k, v):
    scores = jnp.einsum("bthd,bshd->bhts", x[:, :, 0], k) / HEAD_DIM**0.5
    seen = jnp.arange(k.shape[1]) <= positions[:, None, None, None] + jnp.arange(x.shape[1])[:, None]
    weights = jax.nn.softmax(jnp.where(seen, scores, -1e30), axis=-1)
    return jnp.einsum("bhts,bshd->bthd", weights, v)


def decode(x, positions, cache):
    """Write tokens of each sequence from a position of its own on, and attend."""

    def write(array, rows):
        return jax.vmap(lambda a, r, at: lax.dynamic_update_slice(a, r, (at, 0, 0)))(array, rows, positions)

    k, v = write(cache["k"], x[:, :, 1]), write(cache["v"], x[:, :, 2])
    return attend(x, positions, k, v), {"k": k, "v": v}


def float_cache():
    return {name: jnp.zeros((BATCH, LENGTH, HEADS, HEAD_DIM)) for name in "kv"}


def adopted(quantizer, step=decode, **options):
    example = normal(BATCH, 1, 3, HEADS, HEAD_DIM), jnp.zeros(BATCH, jnp.int32), float_cache()
    return adopt.quantize_cache(step, quantizer, example=example, page_size=PAGE, strict=True, **options)


def values(array):
    return np.asarray(array.materialize())


def exact_tokens(array, written):
    """Return which tokens read as they were written: bool [batch, length]."""
    return (values(array) == np.asarray(written)).all(axis=(2, 3))


def run(step, x, start, chunks, cache):
    """Feed tokens in chunks, each sequence from its own start on; return the last result and the cache."""
    jitted, at = jax.jit(step), 0
    for tokens in chunks:
        out, cache = jitted(x[:, at : at + tokens], start + at, cache)
        at += tokens
    return out, cache


@pytest.mark.short(1)
@pytest.mark.parametrize("quantizer", FORMATS)
def test_the_newest_tokens_and_the_first_are_exact(quantizer):
    x, start = normal(BATCH, 43, 3, HEADS, HEAD_DIM), jnp.array([0, 5])
    step = adopted(quantizer)
    _, floats = run(decode, x, start, [1] * 43, float_cache())
    _, cache = run(step, x, start, [1] * 43, step.init(float_cache()))
    for name, pair in zip("kv", quantizer.split("/") * 2, strict=False):
        tokens, sinks = int(pair.split("+exact")[1].split("+")[0]), "+sink" in pair
        exact = exact_tokens(cache[name], floats[name])
        for sequence, newest in enumerate((42, 47)):
            assert exact[sequence, newest + 1 - tokens : newest + 1].all()
            assert exact[sequence, : 8 * sinks].all()
        if not quantizer.startswith("raw"):
            assert not exact[:, PAGE : 2 * PAGE].all()


@pytest.mark.short(1)
@pytest.mark.parametrize("quantizer", FORMATS)
def test_chunks_leave_the_same_cache(quantizer):
    x, start = normal(BATCH, 43, 3, HEADS, HEAD_DIM), jnp.array([0, 5])
    step = adopted(quantizer)
    _, want = run(step, x, start, [1] * 43, step.init(float_cache()))
    for chunks in ([43], [7, 8, 9, 19], [16, 27]):
        _, got = run(step, x, start, chunks, step.init(float_cache()))
        for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            np.testing.assert_array_equal(one, other)


def test_a_prompt_of_more_rows_than_one_turn_takes(monkeypatch):
    x, start = normal(BATCH, 43, 3, HEADS, HEAD_DIM), jnp.array([0, 5])
    step = adopted("int4+rotate+exact9+sink8")
    _, want = run(step, x, start, [43], step.init(float_cache()))
    monkeypatch.setattr("qpaged.arrays._exact_write.MOST_ROWS", 10)
    again = adopted("int4+rotate+exact9+sink8")
    _, got = run(again, x, start, [43], again.init(float_cache()))
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.short(1)
@pytest.mark.parametrize("quantizer", FORMATS)
def test_rejected_drafts_leave_no_trace(quantizer):
    x, start = normal(BATCH, 43, 3, HEADS, HEAD_DIM), jnp.array([0, 5])
    step = adopted(quantizer)
    _, want = run(step, x, start, [20, 23], step.init(float_cache()))
    _, cache = run(step, x[:, :20], start, [20], step.init(float_cache()))
    _, cache = jax.jit(step)(30 * normal(BATCH, 3, 3, HEADS, HEAD_DIM, seed=1), start + 20, cache)
    _, cache = jax.jit(step)(x[:, 20:], start + 20, cache)
    for one, other in zip(jax.tree.leaves(cache), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_page_that_was_left_is_opened_from_its_codes():
    x, start = normal(BATCH, 43, 3, HEADS, HEAD_DIM), jnp.array([0, 5])
    step = adopted("int8+exact9")
    _, cache = run(step, x, start, [43], step.init(float_cache()))
    before = values(cache["k"])
    row = normal(BATCH, 1, 3, HEADS, HEAD_DIM, seed=2)
    _, cache = jax.jit(step)(row, jnp.array([9, 9]), cache)
    after = values(cache["k"])
    np.testing.assert_array_equal(after[:, 9], row[:, 0, 1])
    for unchanged in (slice(0, 9), slice(10, 32)):
        np.testing.assert_array_equal(after[:, unchanged], before[:, unchanged])


@pytest.mark.parametrize("quantizer", FORMATS)
def test_results_are_those_of_the_values(quantizer):
    x, start = normal(BATCH, 43, 3, HEADS, HEAD_DIM), jnp.array([0, 5])
    step = adopted(quantizer)
    out, cache = run(step, x, start, [42, 1], step.init(float_cache()))
    k, v = values(cache["k"]), values(cache["v"])
    want = attend(x[:, 42:], start + 42, k, v)
    np.testing.assert_allclose(out, want, atol=2e-5 * np.abs(want).max())


def test_a_cache_that_is_filled_keeps_its_newest_pages():
    x, start = normal(BATCH, 43, 3, HEADS, HEAD_DIM), jnp.array([0, 5])
    step = adopted("int4+exact9+sink8")
    _, floats = run(decode, x, start, [43], float_cache())
    exact = exact_tokens(step.init(floats)["v"], floats["v"])
    assert exact[0, 32:48].all() and exact[1, 32:48].all() and exact[:, :8].all()
    assert not exact[:, 8:32].any(axis=1).all()


def test_sequences_are_inserted_and_reordered_with_their_exact_pages():
    x, start = normal(BATCH, 43, 3, HEADS, HEAD_DIM), jnp.array([0, 5])
    step = adopted("int4+exact9+sink8")
    _, floats = run(decode, x, start, [43], float_cache())
    _, cache = run(step, x, start, [43], step.init(float_cache()))

    def each(change):
        return lambda cache: jax.tree.map(change, cache)

    swapped = step.apply(each(lambda a: a[jnp.array([1, 0])]), cache)
    np.testing.assert_array_equal(values(swapped["k"]), values(cache["k"])[::-1])
    copied = step.apply(each(lambda a: a.at[0].set(a[1])), cache)
    np.testing.assert_array_equal(values(copied["k"])[0], values(cache["k"])[1])
    inserted = step.apply(each(lambda a: lax.dynamic_update_slice(a, a[1:], (0, 0, 0, 0))), cache)
    np.testing.assert_array_equal(values(inserted["k"])[0], values(cache["k"])[1])
    first = jnp.array([True, False])[:, None, None, None]
    chosen = step.apply(each(lambda a: jnp.where(first, a, a[jnp.array([1, 0])])), cache)
    np.testing.assert_array_equal(values(chosen["k"])[1], values(cache["k"])[0])
    fresh = step.apply(each(lambda a: a.at[0].set(floats["k"][1])), cache)
    assert exact_tokens(fresh["k"], floats["k"][::-1])[0, 32:48].all()
    for changed in (swapped, copied, inserted, chosen, fresh):
        assert jax.tree.structure(changed) == jax.tree.structure(cache)
        jax.jit(step)(x[:, :1], start + 43, changed)


@pytest.fixture
def step_and_cache():
    """A step, and a cache of it with 43 tokens of each sequence, the second from token 5 on."""
    step = adopted("int8:token+exact9")
    x, start = normal(BATCH, 43, 3, HEADS, HEAD_DIM), jnp.array([0, 5])
    _, cache = run(step, x, start, [43], step.init(float_cache()))
    return step, cache


def zero_from(begin):
    """Return a function that cuts an array off at a token, and pads it with zeros."""
    widths = ((0, 0), (0, LENGTH - begin), (0, 0), (0, 0))
    return lambda a: jnp.pad(a[:, :begin], widths)


# What a function does to an array, and how near its values must come to those of floats: what only moves has
# the roundings of another program, and what is quantized anew half a step of int8, absmax / 254.
CHANGES = {
    "cut within a page, and padded": (zero_from(43), 0.02),
    "cut between pages, and padded": (zero_from(40), 1e-6),
    "tokens copied": (lambda a: a.at[:, 0:8].set(a[:, 32:40]), 0.02),
    "a token copied": (lambda a: a.at[:, 50].set(a[:, 2]), 0.02),
    "channels of another sequence": (
        lambda a: lax.dynamic_update_slice(a, a[1:, :, :, :8], (0, 0, 0, 0)),
        0.02,
    ),
    "channels set from another sequence": (lambda a: a.at[0, :, :, :8].set(a[1, :, :, :8]), 0.02),
    "sequences set": (lambda a: a.at[jnp.array([1, 0])].set(a), 1e-6),
    "sequences taken": (lambda a: jnp.take(a, jnp.array([1, 0]), axis=0), 1e-6),
    "joined along the length": (lambda a: jnp.concatenate([a, a], axis=1), 0.02),
    "cut within a page": (lambda a: a[:, :60], 0.02),
    "repeated sequences": (lambda a: jnp.repeat(a, 2, axis=0), 1e-6),
}


@pytest.mark.short(6)
@pytest.mark.filterwarnings("ignore::qpaged.implicit.MaterializeWarning")
@pytest.mark.parametrize("name", CHANGES)
def test_a_function_changes_values_as_it_does_floats(step_and_cache, name):
    (step, cache), (change, bound) = step_and_cache, CHANGES[name]
    changed = step.apply(lambda cache: {"k": change(cache["k"]), "v": change(cache["v"])}, cache)
    for array in "kv":
        np.testing.assert_allclose(
            values(changed[array]), change(jnp.asarray(values(cache[array]))), atol=bound
        )
    if changed["k"].shape[1] == LENGTH:
        return
    x = normal(changed["k"].shape[0], 1, 3, HEADS, HEAD_DIM)
    jax.jit(step)(x, jnp.full(len(x), 20), changed)


def test_a_row_that_is_not_finite_leaves_the_others_of_its_page():
    x, start = normal(BATCH, 43, 3, HEADS, HEAD_DIM), jnp.array([0, 5])
    x = np.array(x)
    x[0, 3] = np.nan
    step = adopted("int8:channel+exact9")
    _, cache = run(step, jnp.asarray(x), start, [43], step.init(float_cache()))
    got = values(cache["k"])[0, :8]
    np.testing.assert_allclose(np.delete(got, 3, axis=0), np.delete(x[0, :8, 1], 3, axis=0), atol=0.05)


def test_what_moves_tokens_chooses_exact_pages_anew():
    x, start = normal(BATCH, 43, 3, HEADS, HEAD_DIM), jnp.array([0, 5])
    step = adopted("int4+exact9")
    _, cache = run(step, x, start, [43], step.init(float_cache()))

    def drop_the_oldest(cache):
        return {name: jnp.pad(a[:, 1:], ((0, 0), (0, 1), (0, 0), (0, 0))) for name, a in cache.items()}

    with pytest.warns(UserWarning, match="has no handler"):
        moved = step.apply(drop_the_oldest, cache)
    assert jax.tree.structure(moved) == jax.tree.structure(cache)
    np.testing.assert_array_equal(values(moved["k"])[0, 33:42], values(cache["k"])[0, 34:43])


def test_a_step_that_moves_its_tokens_is_refused():
    def step(x, positions, cache):
        rolled = {name: jnp.roll(array, -1, axis=1) for name, array in cache.items()}
        k, v = (rolled[name].at[:, -1].set(x[:, 0, 1 + index]) for index, name in enumerate("kv"))
        return attend(x, positions, k, v), {"k": k, "v": v}

    example = normal(BATCH, 1, 3, HEADS, HEAD_DIM), jnp.zeros(BATCH, jnp.int32), float_cache()
    with (
        pytest.warns(UserWarning, match="has no handler"),
        pytest.raises(
            ValueError, match="quantizer must have no exact pages for a cache that a step changes otherwise"
        ),
    ):
        adopt.quantize_cache(step, "int4+exact9", example=example)


def test_an_array_of_another_format_is_refused():
    step, other = adopted("int4+exact9"), adopted("int4")
    x = normal(BATCH, 1, 3, HEADS, HEAD_DIM)
    with pytest.raises(ValueError, match=r"cache/k must be of int4\+exact9, the format of this step"):
        step(x, jnp.zeros(BATCH, jnp.int32), other.init(float_cache()))


def test_exact_pages_are_counted_to_the_byte():
    step = adopted("int4+exact9+sink8")
    cache = step.init(float_cache())
    elements = BATCH * HEADS * HEAD_DIM
    codes = elements * LENGTH // 2 + cache["k"].codes.scales.nbytes
    rows, pages = 4 * elements * 3 * PAGE, 4 * BATCH * HEADS * 3
    assert cache["k"].nbytes == codes + rows + pages
    assert f"{2 * cache['k'].nbytes:,} bytes" in str(step.report())
    assert "int4" in repr(cache["k"]) and "3 pages" in repr(cache["k"])


@pytest.mark.parametrize("length", [512, 4096])
def test_a_step_makes_nothing_as_large_as_the_cache(length):
    shape = BATCH, length, HEADS, 128
    cache = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name in "kv"}

    def step(x, position, cache):
        k = lax.dynamic_update_slice_in_dim(cache["k"], x[:, :, 1], position, 1)
        v = lax.dynamic_update_slice_in_dim(cache["v"], x[:, :, 2], position, 1)
        scores = jnp.einsum("bthd,bshd->bhts", x[:, :, 0], k)
        weights = jax.nn.softmax(jnp.where(jnp.arange(length) <= position, scores, -1e30))
        return jnp.einsum("bhts,bshd->bthd", weights, v), {"k": k, "v": v}

    x, position = jax.ShapeDtypeStruct((BATCH, 1, 3, HEADS, 128), jnp.float32), jnp.int32(0)

    def temporaries(quantizer):
        quantized = adopt.quantize_cache(step, quantizer, example=(x, position, cache), strict=True)
        shapes = jax.eval_shape(quantized.init, cache)
        compiled = jax.jit(quantized, donate_argnums=2).lower(x, position, shapes).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    # Tests compile without fusion, so that each step of arithmetic on rows and on scores is an array.
    rows, scores = 4 * BATCH * 144 * HEADS * 128, 4 * BATCH * HEADS * length
    assert temporaries("int4+exact128") < temporaries("int4") + 4 * rows + 12 * scores
