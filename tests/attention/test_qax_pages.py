"""With qax installed, pages are qax's own implicit arrays, and its transform takes them."""

import jax
import numpy as np
import pytest
from support.arrays import normal
from support.formats import FORMATS

import qpaged
from qpaged.implicit import provider

qax = pytest.importorskip("qax", reason="needs qax") if provider().name == "qax" else None
pytestmark = pytest.mark.skipif(qax is None, reason="needs qax and the JAX that it works on")

CONFIG = qpaged.PagedAttentionCacheMetaData(1, 1, 4, 3, 24, 8, 2, 32, 0.5)
TABLE = np.array([[2, 0, 3]], np.int32)


def decode_attention(query, keys, values):
    """Return the attention of one query [2, 2, head_dim] to 17 tokens on plain pages, in plain JAX."""
    k, v = (pool[:, TABLE[0]].reshape(2, 24, 32)[:, :17] for pool in (keys, values))
    weights = jax.nn.softmax(jax.numpy.einsum("hgd,hsd->hgs", query, k) / 32**0.5)
    return jax.numpy.einsum("hgs,hsd->hgd", weights, v)


@pytest.mark.parametrize("spelling", FORMATS)
def test_qax_attends_over_the_pages(spelling):
    view = qpaged.PagedAttentionCacheView.init(None, "float32", CONFIG, 0, None, spelling)
    prefill = qpaged.PagedAttentionMetadata.prefill(position=np.arange(17), page_table=TABLE[0])
    view = jax.jit(qpaged.PagedAttentionCacheView.write_prefill_to_cache)(
        view, normal(17, 2, 32), normal(17, 2, 32, seed=1), prefill
    )
    assert isinstance(view.key_pages, qax.ImplicitArray)
    query = normal(1, 4, 32, seed=2)
    decode = qpaged.PagedAttentionMetadata.decode(position=np.array([16]), page_table=TABLE)
    expected = jax.jit(qpaged.paged_attention)(query, view, decode)
    out = jax.jit(qax.use_implicit_args(decode_attention))(
        query[0].reshape(2, 2, 32), view.key_pages, view.value_pages
    )
    np.testing.assert_allclose(out.reshape(1, 4, 32), expected, rtol=2e-6, atol=2e-6)
