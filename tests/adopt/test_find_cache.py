"""find_cache describes the cache of a step, or says what it cannot tell."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from support.cache_programs import LENGTH, Program, inputs

from qpaged import adopt

CACHE = {"k": jnp.zeros((2, 32, 2, 16)), "v": jnp.zeros((2, 32, 2, 16))}
X = jnp.ones((2, 1, 2, 16))


def attend(q, k, v):
    weights = jax.nn.softmax(jnp.einsum("bthd,bshd->bhts", q, k), axis=-1)
    return jnp.einsum("bhts,bshd->bthd", weights, v)


def written(array, rows, position):
    return lax.dynamic_update_slice_in_dim(array, rows, position, 1)


def step(x, position, cache):
    cache = {name: written(array, x, position) for name, array in cache.items()}
    return attend(x, cache["k"], cache["v"]), cache


def find(step, *args, **options):
    return adopt.find_cache(step, X, jnp.int32(0), *(args or (CACHE,)), **options)


def test_the_evidence_is_printed():
    text = str(find(step))
    head, *lines = text.splitlines()
    assert head == "2 arrays in cache: 1 key, 1 value"
    assert lines[0] == "cache/k: key, layer 0, float32 (batch 2, length 32, heads 2, head_dim 16)"
    assert lines[1].startswith("    written in part along axis 1 by dynamic_update_slice at ")
    assert lines[2].startswith(f"    read as keys by dot_general at {__file__}:")
    assert lines[3] == "    returned as output 1/k"


def test_shapes_suffice_and_nothing_is_run():
    def costly(x, position, cache):
        jax.debug.callback(pytest.fail)
        return step(x, position, cache)

    shapes = jax.eval_shape(lambda: CACHE)
    assert find(costly, shapes).leaves == find(costly).leaves
    assert len(find(costly, shapes).leaves) == 2


def test_a_part_that_is_returned_before_the_cache_is_not_taken_for_it():
    def with_last_row(x, position, cache):
        out, cache = step(x, position, cache)
        return cache["k"][:, -1:], cache["v"][..., 0], out, cache

    outputs = [leaf.output for leaf in find(with_last_row).leaves]
    assert outputs == ["3/k", "3/v"]


def test_python_values_are_passed_as_they_are():
    def flagged(x, position, cache, *, masked=False, scale=1.0, nothing=None):
        assert isinstance(masked, bool) and scale == 2.0 and nothing is None
        return step(x * scale, position, cache)

    assert len(adopt.find_cache(flagged, X, jnp.int32(0), CACHE, masked=True, scale=2.0).leaves) == 2


def test_keys_and_values_may_be_arguments_of_their_own():
    def apart(x, position, keys, values):
        out, cache = step(x, position, {"k": keys, "v": values})
        return out, cache["k"], cache["v"]

    found = find(apart, CACHE["k"], CACHE["v"])
    assert found.arguments == ("keys", "values")
    quantized = adopt.quantize_cache(
        apart, "int8", example=(X, jnp.int32(0), CACHE["k"], CACHE["v"]), strict=True
    )
    k, v = quantized.init(CACHE["k"], CACHE["v"])
    assert type(quantized(X, jnp.int32(3), k, v)[1]) is type(v)


def test_layers_are_numbered_as_the_program_reads_them():
    """The order of their names does not matter."""
    names = [f"layer{index}" for index in (10, 9, 2)]

    def deep(x, position, cache):
        for name in names:
            x, layer = step(x, position, cache[name])
            cache = cache | {name: layer}
        return x, cache

    found = find(deep, dict.fromkeys(names, CACHE))
    assert {leaf.path: leaf.layer for leaf in found.leaves} == {
        f"cache/{name}/{kv}": index for index, name in enumerate(names) for kv in "kv"
    }


def test_loops_branches_and_calls_are_followed():
    def looped(x, position, cache):
        def body(index, state):
            return step(state[0], position + index, state[1])

        return lax.fori_loop(0, 3, body, (x, cache))

    def branched(x, position, cache):
        return lax.cond(position > 3, step, lambda x, p, cache: (x, cache), x, position, cache)

    for program in (looped, branched, jax.jit(step), jax.checkpoint(step)):
        assert [leaf.role for leaf in find(program).leaves] == ["key", "value"]


def test_a_step_without_a_cache_is_refused():
    with pytest.raises(adopt.CacheNotFoundError, match=r"step must take a cache.* with none of its 2 arrays"):
        adopt.find_cache(lambda a, b: a @ b, jnp.ones((2, 2)), jnp.ones((2, 2)))


def test_an_array_that_is_written_but_not_read_is_a_near_miss():
    def writing(x, position, cache):
        return x, {name: written(array, x, position) for name, array in cache.items()}

    with pytest.raises(
        adopt.CacheNotFoundError, match=r"Nearest to that:\n    cache/k float32.*but no dot_general"
    ):
        find(writing)


def test_a_cache_that_grows_is_a_near_miss():
    def growing(x, position, cache):
        cache = {name: jnp.concatenate([array, x], axis=1) for name, array in cache.items()}
        return attend(x, cache["k"], cache["v"]), cache

    with pytest.raises(
        adopt.CacheNotFoundError, match=r"cache/k .* made anew by concatenate at .* cache of fixed size"
    ):
        find(growing)


def points(x, position, cache):
    """Write at an index along two axes, neither of which a dot batches over."""
    cache = {name: array.at[position, position].set(x[0, 0]) for name, array in cache.items()}
    flat = {name: array.reshape(-1, 2, 16) for name, array in cache.items()}
    weights = jax.nn.softmax(jnp.einsum("thd,shd->hts", x[0], flat["k"]), axis=-1)
    return jnp.einsum("hts,shd->thd", weights, flat["v"]), cache


def test_ambiguous_axes_are_named_by_the_caller():
    with pytest.raises(adopt.CacheNotFoundError, match=r"axes \[0, 1\] may each be the length.*axes="):
        find(points)
    names = ("batch", "length", "heads", "head_dim")
    assert {leaf.axes for leaf in find(points, axes=names).leaves} == {names}
    assert {leaf.axes for leaf in find(points, axes={"k$": names, "v$": names}).leaves} == {names}


@pytest.mark.parametrize(
    "axes", [("batch", "length"), ("batch", "length", "heads", "depth"), ("batch", "heads", "layers", "pair")]
)
def test_unknown_axis_names_are_refused(axes):
    with pytest.raises(ValueError, match="axes must name each of the 4 axes of cache/k float32"):
        find(step, axes=axes)


def test_where_chooses_by_path():
    assert [leaf.path for leaf in find(step, where="/k$").leaves] == ["cache/k"]
    assert [leaf.path for leaf in find(step, where=lambda path: path.endswith("v")).leaves] == ["cache/v"]
    with pytest.raises(adopt.CacheNotFoundError, match=r"where must choose arrays .* 'layers' fits none"):
        find(step, where="layers")


def test_an_unclear_array_beside_clear_ones_is_named():
    def two(x, position, cache, other):
        out, cache = step(x, position, cache)
        return out, cache, points(x, position, other)

    with pytest.raises(adopt.CacheNotFoundError, match=r"2 are, but not\n    other/k .*\n.*\nLeave out"):
        find(two, CACHE, CACHE)
    assert len(find(two, CACHE, CACHE, where="^cache/").leaves) == 2


def test_a_prompt_and_a_token_show_the_same_cache():
    program = Program()
    prompt = adopt.find_cache(program.step, inputs(7), jnp.int32(0), program.cache())
    token = adopt.find_cache(program.step, inputs(1), jnp.int32(0), program.cache())
    assert prompt == token
    assert prompt.leaves[0].shape[1] == LENGTH
