"""ImplicitArray itself: where shape and dtype come from, its pytree, and stored shapes that go stale."""

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.implicit_arrays import Derived, Scaled, dense, example, needs_own_implementation

import qpaged.implicit as qi


@dataclass
class Filled(qi.ImplicitArray):
    value: Any

    def materialize(self):
        return jnp.full(self.shape, self.value, self.dtype)


@dataclass
class Tagged(qi.ImplicitArray):
    x: Any
    tag: str = qi.aux_field(metadata={"note": "static"}, default="none")
    maybe: Any = None

    def materialize(self):
        return self.x


def test_shape_and_dtype_come_from_arguments():
    filled = Filled(jnp.float32(2), shape=(2, 3), dtype=jnp.float32)
    assert (filled.shape, filled.dtype) == ((2, 3), jnp.dtype("float32"))


def test_shape_and_dtype_come_from_materialize():
    tagged = Tagged(jnp.zeros((2, 3), jnp.bfloat16))
    assert (tagged.shape, tagged.dtype) == ((2, 3), jnp.bfloat16)


def test_shape_and_dtype_come_from_class_variables():
    class Three(Filled):
        default_shape = (3,)
        default_dtype = jnp.float32

    assert Three(jnp.float32(1)).shape == (3,)
    assert Three(jnp.float32(1), shape=(4,)).shape == (4,)


def test_shape_and_dtype_come_from_methods():
    @dataclass
    class Computed(qi.ImplicitArray):
        value: Any
        n: int = qi.aux_field(default=2)

        def compute_shape(self):
            return (self.n, self.n)

        def compute_dtype(self):
            return self.value.dtype

        def materialize(self):
            return jnp.broadcast_to(self.value, self.shape)

    array = Computed(jnp.float32(3), n=4)
    assert (array.shape, array.dtype) == ((4, 4), jnp.float32)


@pytest.mark.parametrize(("given", "missing"), [({}, "shape"), ({"shape": (2,)}, "dtype")])
def test_a_shape_or_dtype_that_nothing_gives_is_named(given, missing):
    with pytest.raises(qi.UninitializedAval, match=missing):
        Filled(jnp.float32(1), **given)


def test_a_declared_shape_that_materialize_contradicts_is_warned_about():
    with pytest.warns(UserWarning, match=r"\(3,\).*\(2,\)"):
        Tagged(jnp.zeros(2), shape=(3,))


def test_a_class_without_materialize_cannot_be_instantiated():
    class Nothing(qi.ImplicitArray):
        pass

    with pytest.raises(TypeError, match="materialize"):
        Nothing(shape=(2,), dtype=jnp.float32)


def test_aux_fields_are_tree_structure_and_keep_their_metadata():
    a, b = Tagged(jnp.zeros(2), tag="a"), Tagged(jnp.zeros(2), tag="b")
    assert jax.tree_util.tree_structure(a) != jax.tree_util.tree_structure(b)
    assert len(jax.tree_util.tree_leaves(a)) == 1
    assert Tagged.__dataclass_fields__["tag"].metadata["note"] == "static"


@needs_own_implementation
def test_all_spellings_of_a_dtype_give_equal_tree_structures():
    spellings = (jnp.float32, "float32", np.dtype("float32"))
    trees = [jax.tree_util.tree_structure(Filled(0.0, shape=[2], dtype=d)) for d in spellings]
    assert len(set(trees)) == 1


def test_paths_in_the_tree_are_field_names():
    paths = [
        jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(Tagged(jnp.zeros(2)))
    ]
    assert paths == [".x"]


def test_unflatten_takes_any_children_and_does_not_run_post_init():
    leaves, tree = jax.tree_util.tree_flatten(Tagged(jnp.zeros(2)))
    array = tree.unflatten(["not an array"])
    assert array.x == "not an array"
    assert array.tag == "none"
    assert jax.tree_util.tree_map(lambda leaf: None, array).x is None
    assert len(leaves) == 1


@needs_own_implementation
def test_aval_ndim_and_size_are_the_logical_ones():
    array = example(Scaled)
    assert (array.aval.shape, array.aval.dtype) == ((4, 3), jnp.float32)
    assert (array.ndim, array.size) == (2, 12)


def test_overridden_flattening_is_used():
    leaves, tree = jax.tree_util.tree_flatten(example(Derived))
    assert len(leaves) == 2
    assert tree.unflatten(leaves).shape == (4, 3)


@needs_own_implementation
def test_a_subclass_adds_children_to_those_of_its_parent():
    @dataclass
    class Child(Tagged):
        more: Any = field(default_factory=lambda: jnp.ones(2))

    child = Child(jnp.zeros(2))
    assert len(jax.tree_util.tree_leaves(child)) == 2


@needs_own_implementation
@pytest.mark.parametrize("how", ["vmap", "tree_map"])
def test_a_stale_stored_shape_is_brought_up_to_date(how):
    batch = Scaled(jnp.arange(24, dtype=jnp.int8).reshape(2, 4, 3), jnp.full((2, 1, 1), 0.5))
    assert batch.shape == (2, 4, 3)
    seen = []

    def f(w):
        seen.append(w.shape)
        return w * 2.0

    f = qi.use_implicit_args(f)
    if how == "vmap":
        out = jax.vmap(f)(batch)
        np.testing.assert_array_equal(dense(out), 2 * dense(batch))
    else:
        first = jax.tree_util.tree_map(lambda leaf: leaf[0], batch)
        assert first.shape == (2, 4, 3)  # tree_map does not know of the stored shape
        assert f(first).shape == (4, 3)
    assert seen == [(4, 3)]


@needs_own_implementation
def test_a_stored_shape_survives_tree_map_if_materialize_reads_it():
    array = jax.tree_util.tree_map(lambda leaf: leaf, Filled(jnp.float32(2), shape=(2, 3), dtype=jnp.float32))
    assert qi.use_implicit_args(lambda x: x.shape)(array) == (2, 3)


@needs_own_implementation
def test_children_that_no_longer_fit_together_are_explained_in_the_error():
    @dataclass
    class Product(qi.ImplicitArray):
        a: Any
        b: Any

        def materialize(self):
            return self.a @ self.b.T

    one = Product(jnp.ones((3, 2)), jnp.ones((5, 2)))
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[one] * 4)
    f = qi.use_implicit_args(lambda x: x.shape)
    with pytest.raises(Exception, match="matmul") as error:
        f(stacked)
    assert "children of shapes (4, 3, 2), (4, 5, 2). If they are stacked" in error.value.__notes__[-1]
    assert jax.vmap(qi.use_implicit_args(lambda x: jnp.zeros(x.shape)))(stacked).shape == (4, 3, 5)


@needs_own_implementation
def test_a_class_may_override_default_handler():
    calls = []

    class Own(Tagged):
        @classmethod
        def default_handler(cls, primitive, *args, params=None):
            calls.append(primitive.name)
            return super().default_handler(primitive, *args, params=params)

    with pytest.warns(qi.MaterializeWarning):
        out = qi.use_implicit_args(jax.lax.sin)(Own(jnp.zeros(2)))
    assert calls == ["sin"]
    np.testing.assert_array_equal(out, jnp.zeros(2))


def test_materialize_nested_materializes_one_layer_or_all():
    @dataclass
    class Wrapped(qi.ImplicitArray):
        inner: Any

        def materialize(self):
            return self.inner

    array = Wrapped(example(Scaled))
    assert isinstance(qi.materialize_nested(array), Scaled)
    np.testing.assert_array_equal(qi.materialize_nested(array, full=True), dense(example(Scaled)))
