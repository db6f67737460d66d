"""Wrong arguments raise errors that say what to do."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

import qpaged
from qpaged.adopt import CacheNotFoundError, find_cache, quantize_cache

SHAPE = (2, 32, 2, 16)
X, CACHE = jnp.ones((2, 1, 2, 16)), (jnp.zeros(SHAPE), jnp.zeros(SHAPE))
AXES = ("batch", "length", "heads", "head_dim")


def attend(x, position, keys, values):
    keys = lax.dynamic_update_slice(keys, x, (0, position, 0, 0))
    values = lax.dynamic_update_slice(values, x, (0, position, 0, 0))
    scores = jnp.einsum("bthd,bshd->bhts", x, keys)
    return jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(scores), values), keys, values


def step(x, position, cache):
    out, *cache = attend(x, position, *cache)
    return out, tuple(cache)


def adopted(quantizer="int8", **options):
    return quantize_cache(step, quantizer, example=(X, jnp.int32(0), CACHE), **options)


@pytest.mark.parametrize(
    ("array", "error", "message"),
    [
        (3.0, TypeError, "cache/0 must be an array or a jax.ShapeDtypeStruct, but came as float"),
        (jnp.zeros((2, 0, 2, 16)), ValueError, "cache/0 must have .* with room for a token, but came with"),
        (jnp.zeros(SHAPE[1:]), ValueError, "cache/0 must have the axes"),
    ],
)
def test_init_takes_arrays_of_the_examples_axes(array, error, message):
    with pytest.raises(error, match=message):
        adopted().init((array, CACHE[1]))


@pytest.mark.parametrize("page_size", [0, 2.5, None, "16"])
def test_page_size_must_be_a_positive_integer(page_size):
    with pytest.raises(ValueError, match="page_size must be a whole number, at least 1, but is"):
        adopted(page_size=page_size)


@pytest.mark.parametrize("where", ["(", 3, ["cache"]])
def test_where_must_be_a_pattern_or_a_function(where):
    with pytest.raises(ValueError, match="where must be a regular expression or a function of the path"):
        adopted(where=where)


def test_axes_must_name_each_axis():
    with pytest.raises(ValueError, match=r"axes must name each of the 4 axes .* came as \('length',\)"):
        adopted(axes="length")


def test_axes_must_agree_with_the_program():
    with pytest.raises(CacheNotFoundError, match="no dot_general contracts axis 2, its head_dim"):
        adopted(axes=("batch", "length", "head_dim", "heads"))


def test_formats_by_layer_must_be_of_layers_of_the_cache():
    with pytest.raises(
        ValueError, match=r"quantizer must name layers of the cache's 1, counted from 0, but names \[5\]"
    ):
        adopted(qpaged.CacheFormat.of("int8").with_layers({5: "int4"}))


def test_each_array_must_have_a_path_of_its_own():
    def slashed(x, position, cache):
        out, keys, values = attend(x, position, cache["a/b"], cache["a"]["b"])
        return out, {"a/b": keys, "a": {"b": values}}

    with pytest.raises(ValueError, match="cache/a/b is that of 2; leave slashes out of the keys"):
        find_cache(slashed, X, jnp.int32(0), {"a/b": CACHE[0], "a": {"b": CACHE[1]}})


def test_axes_in_another_order_are_named_in_the_error():
    with pytest.raises(CacheNotFoundError, match=r"axis 2, its length; axes= names them .*: check the order"):
        adopted(axes=("batch", "heads", "length", "head_dim"))


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        (5, "axes must be the names of axes, or a dictionary of them by pattern, but came as 5"),
        (
            {"zzz": AXES},
            "axes must have patterns of the arrays' paths, but 'zzz' fits none: x, position, cache/0",
        ),
    ],
)
def test_axes_are_checked(axes, message):
    with pytest.raises(ValueError, match=message):
        adopted(axes=axes)


def test_where_that_fits_nothing_is_told_the_paths():
    with pytest.raises(CacheNotFoundError, match="fits none of their paths: x, position, cache/0, cache/1"):
        adopted(where="zzz")


def test_a_prompt_as_long_as_the_cache_is_no_example():
    example = (jnp.ones(SHAPE), jnp.int32(0), CACHE)
    with pytest.raises(
        CacheNotFoundError, match=r"written whole by .*, so that the length is not clear; take a"
    ):
        quantize_cache(step, "int8", example=example)
    assert quantize_cache(step, "int8", example=example, axes=AXES).found.leaves


@pytest.mark.parametrize("step", [None, "decode"])
def test_a_step_must_be_a_function(step):
    with pytest.raises(TypeError, match="step must be a function that takes a cache, but came as"):
        quantize_cache(step, "int8", example=(X, jnp.int32(0), CACHE))


def test_init_takes_floats():
    with pytest.raises(TypeError, match="cache/0 must be of floats, but came as int32"):
        adopted().init(tuple(array.astype(jnp.int32) for array in CACHE))


def test_a_cache_of_another_format_is_refused():
    cache = adopted("int4:token").init(CACHE)
    for use in (adopted().init, lambda cache: adopted()(X, jnp.int32(0), cache)):
        with pytest.raises(
            ValueError, match="cache/0 must be of int8, the format of this step, but came as int4:token"
        ):
            use(cache)


def test_a_cache_of_integers_is_quantized_already():
    def step_of_integers(x, cache):
        keys = lax.dynamic_update_slice(cache["k"], x.astype(jnp.int8), (0, 0, 0, 0))
        return jnp.einsum("bthd,bshd->bhts", x, keys.astype(x.dtype) * cache["scale"]), {"k": keys}

    cache = {"k": jnp.zeros(SHAPE, jnp.int8), "scale": jnp.ones((2, 32, 2, 1))}
    with pytest.raises(CacheNotFoundError, match="turn the model's own quantization off"):
        quantize_cache(step_of_integers, "int8", example=(X, cache))
