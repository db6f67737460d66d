"""quantize_cache returns a step, which quantizes a cache, runs on it and reports what it decodes."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from support.arrays import normal
from support.long import first_short
from test_find_cache import CACHE, X, attend, step, written

import qpaged
from qpaged import adopt
from qpaged.implicit import MaterializeWarning

EXAMPLE = (X, jnp.int32(0), CACHE)


def adopted(quantizer="int8", step=step, example=EXAMPLE, **options):
    return adopt.quantize_cache(step, quantizer, example=example, **options)


def centered(x, position, cache):
    """Subtract the mean of the keys, for which they must be decoded."""
    cache = {name: written(array, x, position) for name, array in cache.items()}
    keys = cache["k"] - cache["k"].mean(axis=1, keepdims=True)
    return attend(x, keys, cache["v"]), cache


def quantized(tree):
    return [leaf for leaf in jax.tree_util.tree_leaves(tree, is_leaf=is_quantized) if is_quantized(leaf)]


def is_quantized(leaf):
    return isinstance(leaf, qpaged.QuantizedArray)


def test_the_cache_keeps_its_tree_and_its_logical_arrays():
    cache = adopted("int8:channel/int4:token").init(CACHE)
    assert cache.keys() == CACHE.keys()
    assert [str(cache[name].quantizer) for name in "kv"] == ["int8:channel", "int4:token"]
    assert {(array.shape, array.dtype.name) for array in cache.values()} == {((2, 32, 2, 16), "float32")}
    assert (cache["k"].block, cache["v"].block) == ((1, 16, 1, 1), (1, 1, 1, 16))


def test_a_cache_that_init_was_not_given_is_warned_of_once():
    run = adopted("plain/int8")
    with pytest.warns(UserWarning, match=r"as plain/int8, but 1 arrays of it are floats, cache/v first"):
        _, cache = run(X, jnp.int32(0), CACHE)
    assert not quantized(cache)
    assert str(run.report()).startswith("not quantized: the step ran on a cache of floats")
    run(X, jnp.int32(1), cache)  # warnings are errors here
    initialized = adopted("plain/int8")
    _, cache = initialized(X, jnp.int32(0), initialized.init(CACHE))
    assert is_quantized(cache["v"]) and not is_quantized(cache["k"])


def test_the_report_says_what_is_quantized():
    head, _ = str(adopted("plain/int8:token").report()).splitlines()
    # 2 · 32 · 2 rows of 16 float32; those of the values become 16 codes and a scale of 4 bytes
    assert head == "plain/int8:token: 1 of 2 arrays of the cache quantized, 16,384 -> 10,752 bytes"


def test_the_step_sees_floats_of_its_own_dtype():
    def curious(x, position, cache):
        assert cache["v"].shape == (2, 32, 2, 16) and cache["v"].dtype == jnp.bfloat16
        out, cache = step(x.astype(cache["k"].dtype), position, cache)
        assert cache["v"].dtype == jnp.bfloat16
        return out, cache

    halves = jax.tree_util.tree_map(lambda array: array.astype(jnp.bfloat16), CACHE)
    run = adopted("int8", curious, (X, jnp.int32(0), halves), strict=True)
    out, cache = jax.jit(run)(X, jnp.int32(1), run.init(halves))
    assert out.dtype == jnp.bfloat16 and cache["k"].dtype == jnp.bfloat16
    nbytes = sum(array.nbytes for array in quantized(cache))
    assert nbytes <= 0.52 * sum(array.nbytes for array in halves.values())


@pytest.mark.short(2)
@pytest.mark.parametrize("spelling", ["int8", "int8:token+offset", "nvfp4", "mxfp8", "raw", "plain"])
def test_zeros_count_as_unwritten(spelling):
    cache = {name: jnp.zeros((2, 32, 2, 32)) for name in "kv"}
    run = adopted(spelling, example=(normal(2, 1, 2, 32), jnp.int32(0), cache))
    for made in (run.init(cache), jax.jit(run.init)(cache), run.init(jax.eval_shape(lambda: cache))):
        for array in quantized(made):
            assert not np.any(array.dequantize())
            assert array.scales is None or not np.any(array.scales)
    assert len(quantized(run.init(cache))) == (0 if spelling == "plain" else 2)


@pytest.mark.parametrize("spelling", ["int8", "int8:token", "int8:channel+offset"])
def test_a_cache_that_is_in_use_may_be_quantized(spelling):
    values = normal(2, 32, 2, 16).at[:, 20:].set(0)
    array = adopted(spelling).init({"k": values, "v": values})["k"]
    error = jnp.abs(array.dequantize() - values)[:, :20]
    assert float(error.max()) <= 0.51 * float(array.multipliers().max())
    if array.block[1] == 16:
        np.testing.assert_array_equal(jnp.any(array.scales != 0, axis=(0, 2, 3)), [True, True])
    else:
        np.testing.assert_array_equal(jnp.any(array.scales != 0, axis=(0, 2, 3)), np.arange(32) < 20)


@pytest.mark.short(3)
@pytest.mark.parametrize(("length", "page"), [(32, 16), (48, 16), (100, 10), (30, 15), (13, 13), (37, 1)])
def test_pages_divide_the_length(length, page):
    cache = {name: jnp.zeros((2, length, 2, 16)) for name in "kv"}
    run = adopted(example=(X, jnp.int32(0), cache), strict=True)
    assert run.init(cache)["k"].block == (1, page, 1, 16)
    _, after = jax.jit(run)(X, jnp.int32(length - 1), run.init(cache))
    np.testing.assert_allclose(after["k"].dequantize()[:, -1], X[:, 0], atol=0.02)


def test_formats_may_differ_by_layer():
    def deep(x, position, cache):
        layers = []
        for layer in cache:
            x, layer = step(x, position, layer)
            layers.append(layer)
        return x, layers

    by_layer = qpaged.CacheFormat.of("int8").with_layers({0: "plain", 2: "int8/int4:token"})
    cache = adopted(by_layer, deep, (X, jnp.int32(0), [CACHE] * 3)).init([CACHE] * 3)
    formats = [[str(a.quantizer) if is_quantized(a) else "plain" for a in layer.values()] for layer in cache]
    assert formats == [["plain", "plain"], ["int8", "int8"], ["int8", "int4:token"]]


def test_one_array_must_have_one_format():
    def fused(x, position, cache):
        pair = {"k": cache[:, 0], "v": cache[:, 1]}
        out, pair = step(x, position, pair)
        return out, jnp.stack([pair["k"], pair["v"]], axis=1)

    example = (X, jnp.int32(0), jnp.zeros((2, 2, 32, 2, 16)))
    assert is_quantized(adopted("int8", fused, example).init(example[2]))
    with pytest.raises(
        ValueError,
        match="quantizer must be the same for all keys and values that one array holds, as cache does",
    ):
        adopted("int8/int8:token", fused, example)

    def stacked(x, position, cache):
        return lax.scan(lambda x, layer: step(x, position, layer), x, cache)

    layers = jax.tree_util.tree_map(lambda array: jnp.stack([array] * 3), CACHE)
    by_layer = qpaged.CacheFormat.of("int8").with_layers({1: "int8:token"})
    with pytest.raises(
        ValueError, match="quantizer must be the same for all layers that one array holds, as cache/k does"
    ):
        adopted(by_layer, stacked, (X, jnp.int32(0), layers))


def test_one_program_serves_all_steps_in_place():
    run = adopted(strict=True)
    jitted = jax.jit(run, donate_argnums=2)
    _, cache = jitted(X, jnp.int32(0), run.init(CACHE))
    given = {part.unsafe_buffer_pointer() for part in jax.tree_util.tree_leaves(cache)}
    for position in range(1, 5):
        _, cache = jitted(X, jnp.int32(position), cache)
    assert {part.unsafe_buffer_pointer() for part in jax.tree_util.tree_leaves(cache)} == given
    assert jitted._cache_size() == 1


def test_a_loop_may_carry_the_cache():
    run = adopted(strict=True)

    @jax.jit
    def generate(x, cache):
        return lax.fori_loop(0, 8, lambda index, state: run(state[0], index, state[1]), (x, cache))

    _, looped = generate(X, run.init(CACHE))
    x, cache = X, run.init(CACHE)
    for position in range(8):
        x, cache = jax.jit(run)(x, jnp.int32(position), cache)
    assert jax.tree_util.tree_structure(looped) == jax.tree_util.tree_structure(cache)
    np.testing.assert_array_equal(looped["k"].codes, cache["k"].codes)


def test_a_lazy_step_reports_nothing():
    run = adopted()
    run(X, jnp.int32(0), run.init(CACHE))
    assert not run.report() and str(run.report()).endswith("\nnothing was materialized")


def test_places_that_materialize_are_reported_with_their_lines():
    with pytest.warns(MaterializeWarning):
        run = adopted(step=centered)
    primitives = {place.primitive for place in run.report()}
    assert primitives == {"reduce_sum"}
    place = run.report()[0]
    assert (place.shape, place.dtype, place.nbytes) == ((2, 32, 2, 16), jnp.float32, 2 * 32 * 2 * 16 * 4)
    line = centered.__code__.co_firstlineno + 3
    assert (place.file, place.line) == (__file__, line)
    assert f"materialized:\n    {place.primitive} float32(2, 32, 2, 16), 8,192 bytes, at" in str(run.report())
    with pytest.warns(MaterializeWarning):
        out, cache = jax.jit(run)(X, jnp.int32(0), run.init(CACHE))
    want, _ = centered(X, jnp.int32(0), CACHE)
    np.testing.assert_allclose(out, want, atol=0.02)
    assert len(quantized(cache)) == 2


@pytest.mark.filterwarnings("ignore::qpaged.implicit.MaterializeWarning")
def test_a_strict_step_raises_where_it_would_materialize():
    with pytest.raises(
        adopt.MaterializeError, match=r"since strict is set, but [12] places? materialized:\n"
    ):
        adopted(step=centered, strict=True)


@pytest.mark.filterwarnings("ignore::qpaged.implicit.MaterializeWarning")
def test_a_cache_that_comes_back_decoded_is_quantized_again():
    def clipped(x, position, cache):
        out, cache = step(x, position, cache)
        return out, {name: jnp.clip(array, -8, 8) for name, array in cache.items()}

    run = adopted(step=clipped)
    assert "return" in {place.primitive for place in run.report()}
    _, cache = jax.jit(run)(X, jnp.int32(0), run.init(CACHE))
    assert jax.tree_util.tree_structure(cache) == jax.tree_util.tree_structure(run.init(CACHE))


def test_errors_name_the_argument():
    run = adopted()
    with pytest.raises(ValueError, match="cache must hold the arrays of the example, but lacks cache/v"):
        run.init({"k": CACHE["k"]})
    with pytest.raises(ValueError, match="init takes 1 argument, cache, but got 2"):
        run.init(CACHE, CACHE)
    with pytest.raises(
        ValueError, match=r"cache/k must have the axes \('batch', .* came with shape \(32, 2, 16\)"
    ):
        run.init(jax.tree_util.tree_map(lambda array: array[0], CACHE))
    with pytest.raises(ValueError, match="page_size must be a whole number, at least 1, but is 0"):
        adopted(page_size=0)
    with pytest.raises(ValueError, match="head_dim must be a multiple of 32 for int4"):
        adopted("int4")
    with pytest.raises(qpaged.RegistryError, match="int9"):
        adopted("int9")


def test_old_names_go_on_working():
    with pytest.warns(DeprecationWarning, match="format= of quantize_cache is now quantizer="):
        run = adopt.quantize_cache(step, format="int8:token", example=EXAMPLE)
    with pytest.warns(DeprecationWarning, match="format of QuantizedStep is now quantizer"):
        assert run.format is run.quantizer
    assert run.quantizer == qpaged.CacheFormat.of("int8:token")
    with pytest.warns(DeprecationWarning, match=r"of\(\) of QuantizedStep is now restrict\(\)"):
        part = run.of(step, run.found)
    assert part.quantizer == run.quantizer


def test_a_quantized_cache_is_left_as_it_is_by_init():
    run = adopted()
    cache = run.init(CACHE)
    again = run.init(cache)
    for name in CACHE:
        np.testing.assert_array_equal(again[name].codes, cache[name].codes)


def test_a_cache_of_another_page_is_taken_after_init():
    run = adopted("int8")
    run.init(CACHE)
    cache = adopted("int8", page_size=8).init(CACHE)
    with pytest.raises(ValueError, match=r"made elsewhere, pass it through step\.init"):
        run(X, jnp.int32(0), cache)
    _, cache = run(X, jnp.int32(0), run.init(cache))
    assert cache["k"].block == (1, 8, 1, 16)


def each(change):
    return lambda cache: jax.tree_util.tree_map(change, cache)


CHANGES = {
    "insert a sequence": each(lambda array: array.at[1].set(normal(32, 2, 16, seed=7))),
    "reorder beams": each(lambda array: array[jnp.array([1, 1])]),
    "roll by a token": each(lambda array: jnp.roll(array, -1, axis=1)),
    "roll by a page": each(lambda array: jnp.roll(array, -16, axis=1)),
    "truncate": each(lambda array: array.at[:, 10:].set(0)),
    "compact": each(lambda array: array[:, jnp.array([*range(4), *range(5, 32), 0])]),
    "halve the length": each(lambda array: array[:, :16]),
    "three quarters": each(lambda array: array[:, :24]),
    "double the batch": each(lambda array: jnp.concatenate([array, array])),
    "compute": each(lambda array: array + 1),
}


@pytest.mark.short(4)
@pytest.mark.parametrize("quantizer", first_short(1, ["int8", "int8:token", "int4:token"]))
@pytest.mark.parametrize("name", CHANGES)
def test_functions_of_the_cache_are_applied_as_to_floats(name, quantizer):
    run = adopted(quantizer)
    floats = {"k": normal(2, 32, 2, 16, seed=1), "v": normal(2, 32, 2, 16, seed=2)}
    cache = run.init(floats)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MaterializeWarning)  # computing decodes
        changed = jax.jit(lambda cache: run.apply(CHANGES[name], cache))(cache)
    want = CHANGES[name]({key: array.dequantize() for key, array in cache.items()})
    for key, array in changed.items():
        assert is_quantized(array) and array.quantizer == cache[key].quantizer and array.quantizer.writable
        largest = float(jnp.abs(want[key]).max())
        # One rounding anew: half a step, of which a block's largest value has 64 (a power of two), 127 and 7.
        tolerance = {"int8": 2**-6, "int8:token": 2**-7, "int4:token": 2**-3}[quantizer] * largest
        np.testing.assert_allclose(array.dequantize(), want[key], atol=tolerance)
    x = jnp.ones((changed["k"].shape[0], *X.shape[1:]))
    _, cache = jax.jit(run)(x, jnp.int32(3), changed)  # the step takes it
    assert jax.tree_util.tree_structure(cache) == jax.tree_util.tree_structure(changed)


def test_a_function_that_returns_another_tree_is_refused():
    run = adopted()
    with pytest.raises(ValueError, match=r"function must return the tree of the cache, .* but returned"):
        run.apply(lambda cache: cache["k"], run.init(CACHE))


SHORTENED_APART = {  # those of a cache of 48 tokens, in three pages
    "to 16 tokens": lambda array: array[:, :16],
    "to 40 tokens": lambda array: array[:, :40],
    "by a token": lambda array: array[:, 1:],
    "lengthened": lambda array: jnp.concatenate([array, array[:, -2:]], axis=1),
}


@pytest.mark.parametrize("change", SHORTENED_APART)
def test_codes_and_scales_that_were_shortened_apart_are_refused(change):
    run = adopted("int8")
    cache = {name: jnp.zeros((2, 48, 2, 16)) for name in CACHE}
    cache = jax.tree_util.tree_map(SHORTENED_APART[change], run.init(cache))
    with pytest.raises(ValueError, match=r"cache/k has codes .* as step.init made them.* step\.apply"):
        jax.jit(run)(X, jnp.int32(0), cache)


def test_codes_and_scales_that_were_divided_by_sequences_are_taken():
    run = adopted("int8")
    cache = jax.tree_util.tree_map(lambda array: array[:1], run.init(CACHE))
    _, after = jax.jit(run)(X[:1], jnp.int32(0), cache)
    assert after["k"].shape == (1, *CACHE["k"].shape[1:])


def test_a_cache_that_is_taken_by_name_alone_is_given_in_a_dictionary():
    def keyword_only(x, position, *, cache):
        return step(x, position, cache)

    run = adopted(step=keyword_only, example={"x": X, "position": jnp.int32(0), "cache": CACHE})
    _, cache = jax.jit(run)(X, jnp.int32(0), cache=run.init(CACHE))
    assert len(quantized(cache)) == 2


@pytest.mark.parametrize(
    ("example", "message"),
    [
        ((X, jnp.int32(0)), r"arguments of step\(x, position, cache\), but does not: .*'cache'"),
        ((*EXAMPLE, 1), "too many positional arguments"),
        ({"x": X, "positions": 0}, "missing a required argument: 'position'"),
        (X, r"example must be a tuple .* of a single argument it is \(argument,\)"),
    ],
)
def test_an_example_that_the_step_does_not_take_is_refused(example, message):
    with pytest.raises(TypeError, match=message):
        adopted(example=example)


def test_outputs_that_are_no_arrays_come_back():
    def named(x, position, cache):
        out, cache = step(x, position, cache)
        return {"logits": out, "cache": cache, "kind": "decode", "none": None}

    run = adopted(step=named)
    out = run(X, jnp.int32(0), run.init(CACHE))
    assert out["kind"] == "decode" and out["none"] is None and len(quantized(out["cache"])) == 2


def test_a_step_that_was_jitted_stays_jitted():
    @functools.partial(jax.jit, donate_argnames=("cache",), static_argnames=("causal",))
    def jitted(x, position, cache, causal):
        return step(x, position, cache) if causal else (x, cache)

    run = adopted(step=jitted, example=(*EXAMPLE, True))
    first = run.init(CACHE)
    _, cache = run(X, 0, first, causal=True)
    assert all(leaf.is_deleted() for leaf in jax.tree_util.tree_leaves(first))  # donated, as before
    run._run_step = None  # type: ignore[assignment]  # a call that traced it once more would fail
    for position in range(1, 4):  # a Python number is no constant of the program
        out, cache = run(X, position, cache, causal=True)
    want = adopted().init(CACHE)
    plain = adopted()
    for position in range(4):
        want_out, want = jax.jit(plain)(X, jnp.int32(position), want)
    np.testing.assert_array_equal(out, want_out)


def test_what_only_calls_a_jitted_function_is_called_as_it_is():
    """A method's argument numbers count its object, and a wrapper may look at values."""
    jitted, positions = jax.jit(step, donate_argnums=2), []

    @functools.wraps(jitted)
    def checked(x, position, cache):
        positions.append(int(position))
        return jitted(x, position, cache)

    run = adopt.quantize_cache(checked, "int8", example=(X, 0, CACHE))
    for position in (1, 2):
        run(X, position, run.init(CACHE))
    assert positions[-2:] == [1, 2]

    class Model:
        @functools.partial(jax.jit, static_argnums=0, donate_argnames="cache")
        def step(self, x, position, cache):
            return step(x, position, cache)

    run = adopt.quantize_cache(Model().step, "int8", example=EXAMPLE)
    x = jnp.array(X)
    run(x, jnp.int32(0), run.init(CACHE))
    assert not x.is_deleted()


def test_the_names_of_arguments_are_the_steps_own():
    def named(x, where, axes):
        return step(x, where, axes)

    run = adopt.quantize_cache(named, "int8", example={"x": X, "where": jnp.int32(0), "axes": CACHE})
    assert len(run.found.leaves) == 2


def test_a_step_names_its_function_and_its_format():
    def step(x, cache):
        return x @ cache.T, cache.at[:2].set(x)

    step = adopt.quantize_cache(
        step, "int8:token", example=(jnp.ones((2, 16)), jnp.ones((64, 16))), axes=("length", "head_dim")
    )
    assert repr(step) == "QuantizedStep(step, int8:token, 1 arrays of its cache)"
