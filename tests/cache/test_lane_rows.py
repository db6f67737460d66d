"""Pools whose slots are short: several share a row of a TPU's lanes, and only the leaf's shape tells."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec
from support.caches import PAGES, bits, decode, make_view, prefill, tokens

import qpaged
from qpaged.arrays import fill_lane_rows, gather_pages, write_rows
from qpaged.implicit import use_implicit_args

SIZES = {"page_size": 8, "kv_head_dim_size": 64}
FORMATS = {"raw": 2, "int8": 2, "int8:token": 2, "int4": 4}  # and slots of a row
TABLE = np.array([3, 1, 5, 7])
STEP = decode(np.array([7, -1]), np.stack([TABLE, TABLE]))

fresh = functools.cache(functools.partial(make_view, **SIZES))
write = jax.jit(lambda view, key, value: view.write_decodes_to_cache(key, value, STEP), donate_argnums=0)


@functools.cache
def filled(format):
    key, value = tokens(8, head_dim=64)
    return fresh(format).write_prefill_to_cache(key, value, prefill(np.arange(8), TABLE, 7))


def copied(tree):
    return jax.tree_util.tree_map(jnp.copy, tree)


def structure(tree):
    return jax.tree_util.tree_structure(tree)


def unfolded(pool):
    """The pool as one that no cache made."""
    return pool.like(pool.codes, pool.parts, slots_per_row=1)


@pytest.mark.parametrize(("format", "folds"), FORMATS.items())
def test_rows_are_full_and_codes_are_as_ever(format, folds):
    pool = filled(format).key_pages
    leaf = jax.tree_util.tree_leaves(pool)[0]
    assert leaf.shape == (2, PAGES, 8 // folds, 128)
    assert pool.shape == (2, PAGES, 8, 64)
    abstract = jax.eval_shape(lambda: pool)
    assert pool.codes.shape == abstract.codes.shape == (2, PAGES, 8, 128 // folds)
    np.testing.assert_array_equal(np.asarray(leaf).reshape(pool.codes.shape), pool.codes)
    np.testing.assert_array_equal(pool.materialize(), unfolded(pool).materialize())


@pytest.mark.parametrize(
    ("format", "page_size", "folds"), [("int6", 32, 8), ("int5", 64, 16), ("int3", 64, 16)]
)
def test_rows_of_planes_fill_the_lanes_several_times(format, page_size, folds):
    pool = make_view(format, **(SIZES | {"page_size": page_size})).key_pages
    width = pool.codes.shape[-1]
    assert pool.slots_per_row == folds and folds * width % 128 == 0
    assert jax.tree_util.tree_leaves(pool)[0].shape == (2, PAGES, 4, folds * width)
    half = make_view(format, **(SIZES | {"page_size": page_size // 2})).key_pages
    assert half.slots_per_row == 1  # a TPU would lay out two rows of bytes another way


@pytest.mark.parametrize(
    "changes",
    [{"kv_head_dim_size": 128}, {"kv_head_dim_size": 96}, {"page_size": 3}, {"page_size": 2}],
    ids=str,
)
def test_slots_that_do_not_fill_several_rows_lie_as_they_are(changes):
    pool = make_view("int8", **(SIZES | changes)).key_pages
    assert jax.tree_util.tree_leaves(pool)[0].shape == pool.shape


def test_slots_or_channels_divided_over_devices_do_not_share_rows():
    class Channels:
        def resolve(self, axes, mode, shape):
            return PartitionSpec(None, None, None, "tp")

    mesh = Mesh(np.array(jax.devices()[:2]), ("tp",))
    pool = make_view("int8", mesh=mesh, manager=Channels(), **SIZES).key_pages
    assert pool.codes.addressable_shards[0].data.shape == (2, PAGES, 8, 32)


@pytest.mark.parametrize("format", FORMATS)
def test_a_write_leaves_a_pool_stored_as_it_was_and_in_place(format):
    view = copied(filled(format))
    key, value = tokens(2, seed=1, head_dim=64)
    want = [unfolded(pool) for pool in (view.key_pages, view.value_pages)]
    want = jax.jit(lambda a, b: view.replace(key_pages=a, value_pages=b))(*want)
    want = jax.jit(lambda view: view.write_decodes_to_cache(key, value, STEP))(want)
    before = [leaf.unsafe_buffer_pointer() for leaf in jax.tree_util.tree_leaves(view)]
    after = write(view, key, value)
    assert structure(after) == structure(fresh(format))
    assert [leaf.unsafe_buffer_pointer() for leaf in jax.tree_util.tree_leaves(after)] == before
    for got, expected in ((after.key_pages, want.key_pages), (after.value_pages, want.value_pages)):
        assert bits(unfolded(got)) == bits(expected)


@pytest.mark.parametrize("format", ["raw", "int8"])
def test_loops_and_layers_side_by_side(format):
    view, key = filled(format), jnp.ones((2, 2, 64))
    step = lambda view: view.write_decodes_to_cache(key, key, STEP)  # noqa: E731
    both = jax.tree_util.tree_map(lambda leaf: jnp.stack([leaf, leaf]), view)

    @jax.jit
    def program(view, both):
        looped = jax.lax.fori_loop(0, 2, lambda _, view: step(view), view)
        return step(view), looped, jax.vmap(step)(both)

    once, looped, both = program(view, both)
    assert bits(once) == bits(looped)
    assert bits(jax.tree_util.tree_map(lambda leaf: leaf[1], both)) == bits(once)


def test_an_overwrite_leaves_a_pool_stored_as_it_was():
    pool = filled("int8").key_pages

    @use_implicit_args
    def program(pool):
        return jax.lax.dynamic_update_slice(pool, jnp.ones(pool.shape), (0, 0, 0, 0))

    assert structure(program(pool)) == structure(pool)


@pytest.mark.parametrize("format", FORMATS)
def test_reads_take_pages_as_they_lie(format):
    pool, pages = filled(format).key_pages, jnp.array([1, PAGES, 3])
    want = gather_pages(unfolded(pool), pages)
    for read in (
        gather_pages,
        use_implicit_args(lambda pool, pages: pool.at[:, pages].get(mode="fill", fill_value=0)),
    ):
        assert bits(read(pool, pages)) == bits(want)
    jaxpr = jax.make_jaxpr(gather_pages)(pool, pages)
    gathered = [eqn.invars[0].aval.shape for eqn in jaxpr.eqns if eqn.primitive.name == "gather"]
    assert gathered[0] == jax.tree_util.tree_leaves(pool)[0].shape


@pytest.mark.parametrize("format", FORMATS)
def test_a_record_holds_the_codes_unfolded(format):
    view = filled(format)
    record = view.to_dict()
    assert record["key_pages"]["codes"].shape == view.key_pages.codes.shape
    again = type(view).from_dict(record)
    assert structure(again) == structure(view) and bits(again) == bits(view)


def test_a_callables_pages_are_stored_likewise():
    format = qpaged.get_quantizer("int8")
    view = make_view(lambda zeros: format.quantize(zeros), **SIZES)
    assert structure(view.key_pages) == structure(fresh("int8").key_pages)
    assert bits(view.key_pages) == bits(fill_lane_rows(format.empty(view.key_pages.shape, jnp.float32)))


@pytest.mark.skipif(not hasattr(jax, "shard_map"), reason="needs jax.shard_map")
def test_each_device_writes_to_heads_of_its_own():
    mesh = Mesh(np.array(jax.devices()[:2]), ("tp",))
    view = filled("int8:token")
    key, _ = tokens(2, seed=1, head_dim=64)
    heads = PartitionSpec("tp")

    def steps(pool, rows):
        return write_rows(pool, (1, 2), (jnp.array([3, 5]), jnp.array([7, 0])), rows)

    apart = jax.jit(
        jax.shard_map(steps, mesh=mesh, in_specs=(heads, PartitionSpec(None, "tp")), out_specs=heads)
    )
    assert bits(apart(view.key_pages, key)) == bits(jax.jit(steps)(view.key_pages, key))
