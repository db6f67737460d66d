"""Law 7: code that takes a cache cannot tell a plain pool from a quantized one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.arrays import leaves_equal, normal
from support.formats import FEW

import qpaged
from qpaged.implicit import use_implicit_args

HEAD_DIM = 32
CONFIG = qpaged.PagedAttentionCacheMetaData(3, 2, 8, 3, 24, 8, 2, HEAD_DIM, 0.5)
TABLE = np.array([[0, 3, 5], [7, 1, 2], [8, 8, 8]], np.int32)
POSITION = np.array([17, 9, -1], np.int32)


def serve(format, dtype=jnp.float32):
    """Return the attention after two prefills and a decode."""
    cache = qpaged.PagedAttentionCache.init_cache(None, dtype, CONFIG, None, format)

    @jax.jit
    def step(view):
        for row, length in enumerate((17, 9)):
            prefill = qpaged.PagedAttentionMetadata.prefill(
                position=np.arange(17), page_table=TABLE[row], length=length
            )
            view = view.write_prefill_to_cache(
                normal(17, 2, HEAD_DIM, seed=row), normal(17, 2, HEAD_DIM, seed=row + 5), prefill
            )
        decode = qpaged.PagedAttentionMetadata.decode(position=POSITION, page_table=TABLE)
        view = view.write_decodes_to_cache(
            normal(3, 2, HEAD_DIM, seed=8), normal(3, 2, HEAD_DIM, seed=9), decode
        )
        return qpaged.paged_attention(normal(3, 4, HEAD_DIM, seed=10), view, decode)

    return step(cache.views[0])


def test_attention_over_raw_pages_has_the_bits_of_plain_ones():
    assert leaves_equal(serve("raw"), serve(None))


def plain_attention(query, keys, values, table, position):
    """Return decode attention by code that is written for plain pools."""
    heads, _, page_size, head_dim = keys.shape
    slot = jnp.arange(table.shape[1] * page_size)
    k = jnp.take(keys, table, axis=1, mode="fill", fill_value=0).reshape(heads, len(table), -1, head_dim)
    v = jnp.take(values, table, axis=1, mode="fill", fill_value=0).reshape(heads, len(table), -1, head_dim)
    q = query.reshape(len(query), heads, -1, head_dim)
    scores = jnp.einsum("bhgd,hbsd->bhgs", q, k) / head_dim**0.5
    visible = slot <= position[:, None, None, None]
    weights = jnp.where(visible, jax.nn.softmax(jnp.where(visible, scores, -1e30)), 0)
    return jnp.einsum("bhgs,hbsd->bhgd", weights, v).reshape(query.shape)


@pytest.mark.parametrize("format", FEW)
def test_attention_that_is_written_for_plain_arrays_accepts_pages(format):
    quantizer = qpaged.get_quantizer(format)
    keys = quantizer.quantize(normal(*CONFIG.pool_shape, seed=1))
    values = quantizer.quantize(normal(*CONFIG.pool_shape, seed=2))
    query = normal(3, 4, HEAD_DIM, seed=10)
    view = qpaged.PagedAttentionCacheView(CONFIG, 0, keys, values)
    metadata = qpaged.PagedAttentionMetadata.decode(position=POSITION, page_table=TABLE)
    out = jax.jit(qpaged.paged_attention)(query, view, metadata)
    lazy = jax.jit(use_implicit_args(plain_attention))(query, keys, values, TABLE, POSITION)
    np.testing.assert_allclose(lazy, out, rtol=2e-6, atol=2e-6)
