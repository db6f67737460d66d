"""Small caches of every format, and jitted calls on them."""

import contextlib
import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np

import qpaged
from qpaged.implicit import ImplicitArray
from support.formats import CACHES  # noqa: F401 - for the tests of the cache

HEADS, PAGES, PAGE_SIZE, HEAD_DIM = 2, 16, 4, 32
BATCH, SEQUENCE_PAGES = 2, 4
CAPACITY = SEQUENCE_PAGES * PAGE_SIZE

SOME = (None, "raw", "int8", "int8:token")


def config(**changes):
    """Return the metadata of a small cache."""
    counts = {
        "batch_size": BATCH,
        "num_hidden_layers": 2,
        "num_pages_per_layer": PAGES,
        "num_pages_per_sequence": SEQUENCE_PAGES,
        "max_sequences": CAPACITY,
        "page_size": PAGE_SIZE,
        "num_kv_heads": HEADS,
        "kv_head_dim_size": HEAD_DIM,
        "hbm_utilization": 0.9,
    }
    return qpaged.PagedAttentionCacheMetaData(**(counts | changes))


@contextlib.contextmanager
def narrow_floats_allowed():
    """Ignore the warning of plain pools in narrow floats."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", qpaged.NarrowFloatPoolWarning)
        yield


def make_view(format=None, dtype=jnp.float32, mesh=None, manager=None, layer=0, **changes):
    """Return a fresh view of a small cache."""
    with narrow_floats_allowed():
        return qpaged.PagedAttentionCacheView.init(mesh, dtype, config(**changes), layer, manager, format)


@functools.cache
def fresh(format=None, dtype="float32"):
    """Return a fresh view, which tests share since views are never mutated."""
    return make_view(format, dtype)


@functools.cache
def fresh_cache(format=None, dtype="float32"):
    """Return a fresh cache of two layers, which tests share."""
    with narrow_floats_allowed():
        return qpaged.PagedAttentionCache.init_cache(None, dtype, config(), None, format)


def tokens(n, seed=0, heads=HEADS, head_dim=HEAD_DIM):
    """Return keys and values of n tokens, NumPy float32."""
    rng = np.random.default_rng(seed)
    shape = (n, heads, head_dim)
    return rng.normal(size=shape).astype(np.float32), rng.normal(size=shape).astype(np.float32)


write_prefill = jax.jit(lambda view, key, value, metadata: view.write_prefill_to_cache(key, value, metadata))
write_decodes = jax.jit(lambda view, key, value, metadata: view.write_decodes_to_cache(key, value, metadata))
attend = jax.jit(lambda query, view, metadata: qpaged.paged_attention(query, view, metadata))
reset = jax.jit(lambda view, pages: view.reset_pages(pages))


def prefill(position, page_table, length=None):
    return qpaged.PagedAttentionMetadata.prefill(position=position, page_table=page_table, length=length)


def decode(position, page_table):
    return qpaged.PagedAttentionMetadata.decode(position=position, page_table=page_table)


def dense(pool):
    """Return a pool's values, NumPy float32."""
    if isinstance(pool, ImplicitArray):
        pool = pool.materialize()
    return np.asarray(pool).astype(np.float32)


def slots(pool, page_table):
    """Return the slots of a sequence in order, [tokens, kv_heads, head_dim]."""
    pages = dense(pool)[:, np.asarray(page_table)]
    return pages.reshape(pages.shape[0], -1, pages.shape[-1]).swapaxes(0, 1)


def bits(tree):
    """Return the dtype, shape and bytes of every leaf."""
    return [(str(x.dtype), x.shape, np.asarray(x).tobytes()) for x in jax.tree_util.tree_leaves(tree)]


def used_pages(pool, empty):
    """Return the indices of the pages that differ from the ``empty`` pool in any stored part."""
    pairs = zip(jax.tree_util.tree_leaves(pool), jax.tree_util.tree_leaves(empty), strict=True)
    changed = [(np.asarray(a) != np.asarray(b)).any(axis=(0, 2, 3)) for a, b in pairs]
    return sorted(int(page) for page in np.flatnonzero(np.any(changed, axis=0)))


def tolerance(format):
    """Return a bound on the error of gaussian values, loose enough for every format of so many bits."""
    if format in (None, "raw"):
        return 0.0
    return {8: 0.5, 4: 0.6, 2: 2.0}[qpaged.CacheFormat.of(format).key.bits]


def make_mesh(shape, names, axis_type="Auto"):
    """Return a mesh of the first devices; older versions of JAX have no ``axis_type``."""
    devices = np.array(jax.devices()[: int(np.prod(shape))]).reshape(shape)
    kinds = getattr(jax.sharding, "AxisType", None)
    if kinds is None:
        return jax.sharding.Mesh(devices, names)
    return jax.sharding.Mesh(devices, names, axis_types=(getattr(kinds, axis_type),) * len(names))
