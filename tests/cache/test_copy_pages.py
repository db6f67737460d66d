"""copy_pages of a view and of a cache: whole pages, scales included, on every kind of pool."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.caches import SOME
from support.long import first_short

import qpaged
from qpaged._compat import has_explicit_meshes

CONFIG = qpaged.PagedAttentionCacheMetaData(1, 2, 8, 4, 64, 16, 2, 32, 0.5)
TABLE = np.array([3, 0, 5])


def written_cache(quantizer, mesh=None):
    """Return a cache of two layers whose pages 3, 0 and 5 hold 40 tokens."""
    cache = qpaged.PagedAttentionCache.init_cache(mesh, jnp.float32, CONFIG, quantizer=quantizer)
    rows = jnp.asarray(np.random.default_rng(0).normal(size=(40, 2, 32)), jnp.float32)
    step = qpaged.PagedAttentionMetadata.prefill(position=np.arange(40), page_table=TABLE)
    views = [view.write_prefill_to_cache(rows + view.layer_index, -rows, step) for view in cache.views]
    return cache.replace(views=views)


def leaves(cache):
    return [np.asarray(leaf) for leaf in jax.tree_util.tree_leaves(cache)]


@pytest.mark.parametrize("quantizer", first_short(3, SOME))
def test_every_layer_gets_the_copies(quantizer):
    cache = written_cache(quantizer)
    copied = jax.jit(qpaged.PagedAttentionCache.copy_pages)(cache, np.array([3, 5]), np.array([7, 3]))
    assert jax.tree_util.tree_structure(copied) == jax.tree_util.tree_structure(cache)
    for before, after in zip(leaves(cache), leaves(copied), strict=True):
        want = before.copy()
        want[:, [7, 3]] = before[:, [3, 5]]
        assert after.tobytes() == want.tobytes()


def test_a_copied_sequence_attends_as_the_original():
    view = written_cache("int8:token").views[1].copy_pages(TABLE, [1, 2, 4])
    query = jnp.ones((1, 4, 32))
    outs = []
    for table in (TABLE, [1, 2, 4]):
        step = qpaged.PagedAttentionMetadata.decode(position=[39], page_table=[table])
        outs.append(qpaged.paged_attention(query, view, step))
    np.testing.assert_array_equal(*outs)


def test_one_page_alone_may_be_copied():
    view = written_cache("int8").views[0].copy_pages(3, 1)
    np.testing.assert_array_equal(view.key_pages.codes[:, 1], view.key_pages.codes[:, 3])


@pytest.mark.skipif(not has_explicit_meshes(), reason="this JAX has no meshes with Explicit axes")
def test_copies_keep_an_explicit_sharding():
    mesh = jax.make_mesh((2,), ("tp",))
    cache = written_cache("int8", mesh)
    copied = jax.jit(qpaged.PagedAttentionCache.copy_pages)(cache, np.array([3]), np.array([7]))
    for before, after in zip(*map(jax.tree_util.tree_leaves, (cache, copied)), strict=True):
        assert after.sharding.is_equivalent_to(before.sharding, before.ndim)
    for before, after in zip(leaves(cache), leaves(copied), strict=True):
        assert after[:, 7].tobytes() == before[:, 3].tobytes()


def test_source_and_target_must_have_as_many_pages():
    message = "source and target must have one page each for every copy, but came with 2 and 1 pages"
    with pytest.raises(ValueError, match=message):
        written_cache("int8").copy_pages([1, 2], [3])


@pytest.mark.parametrize("name", ["source", "target"])
def test_pages_must_be_integers_in_a_row(name):
    view = written_cache("int8").views[0]
    pages = {"source": [1], "target": [2]}
    with pytest.raises(TypeError, match=f"{name} must be integers, but came as float64"):
        view.copy_pages(**(pages | {name: np.array([0.5])}))
    with pytest.raises(ValueError, match=rf"{name} must have shape \(n,\), but came with shape \(1, 1\)"):
        view.copy_pages(**(pages | {name: np.array([[1]])}))
