"""Programs that forbid the promotion of ranks in their own code can use caches all the same."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from support.arrays import normal
from support.long import first_short

import qpaged
from qpaged import adopt

FORMATS = ["int8", "int4:token+rotate", "plain", "raw", "int8:token", "int8:channel+offset", "nvfp4", "mxfp4"]


@pytest.fixture(autouse=True)
def _forbidden():
    with jax.numpy_rank_promotion("raise"):
        yield


def test_it_is_forbidden_here():
    with pytest.raises(ValueError, match="rank_promotion"):
        jnp.ones((2, 3)) + jnp.ones(3)


@pytest.mark.long
@pytest.mark.parametrize("spelling", first_short(1, FORMATS))
def test_a_paged_cache(spelling):
    quantizer = qpaged.CacheFormat.of(spelling)
    config = qpaged.PagedAttentionCacheMetaData(1, 1, 8, 4, 32, 16, 2, 64, 0.9)
    view = qpaged.PagedAttentionCacheView.init(None, jnp.float32, config, 0, quantizer=quantizer)
    rows, table = normal(20, 2, 64), np.arange(4)
    prefill = qpaged.PagedAttentionMetadata.prefill(position=np.arange(20), page_table=table)
    decode = qpaged.PagedAttentionMetadata.decode(position=[20, -1], page_table=[table] * 2)
    ragged = qpaged.PagedAttentionMetadata.ragged(
        position=[21, 22, 23, 20, 0], page_tables=[table, table + 4], starts=[0, 3, 4]
    )

    def run(view):
        view = view.write_prefill_to_cache(rows, rows, prefill)
        view = view.write_decodes_to_cache(rows[:2], rows[:2], decode).copy_pages([0], [5])
        view = view.write_to_cache(rows[:5], rows[:5], ragged).put_pages([6], view.take_pages([0]))
        query, outs = normal(20, 4, 64, seed=1), []
        options = {"sliding_window": 8, "logits_soft_cap": 30.0, "sinks": jnp.zeros(4)}
        for backend in ("xla", "reference"):
            outs.append(qpaged.paged_attention(query, view, prefill, backend=backend, **options))
            outs.append(qpaged.paged_attention(query[:2], view, decode, backend=backend, **options))
            outs.append(qpaged.paged_attention(query[:5], view, ragged, backend=backend, **options))
        return outs

    for eager, jitted in zip(run(view), jax.jit(run)(view), strict=True):
        np.testing.assert_allclose(eager, jitted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("spelling", first_short(1, ["int8", "int4:token+rotate", "nvfp4", "int8+offset"]))
def test_an_adopted_cache(spelling):
    def step(x, position, cache):
        cache = {name: lax.dynamic_update_slice_in_dim(a, x, position, 1) for name, a in cache.items()}
        scores = jnp.einsum("bthd,bshd->bhts", x, cache["k"])
        return jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(scores), cache["v"]), cache

    cache, x = {name: jnp.zeros((2, 32, 2, 64)) for name in "kv"}, jnp.ones((2, 1, 2, 64))
    adopted = adopt.quantize_cache(step, spelling, example=(x, jnp.int32(0), cache), strict=True)
    out, cache = jax.jit(adopted)(x, jnp.int32(0), adopted.init(cache))
    assert np.isfinite(out).all()
    seen = (jnp.arange(32) < 4).reshape(1, 32, 1, 1)
    masked = adopted.apply(lambda cache: {name: jnp.where(seen, a, 0) for name, a in cache.items()}, cache)
    step_of_codes = float(masked["k"].multipliers().max())  # pages in use have no exact zeros
    assert float(jnp.abs(masked["k"].dequantize()[:, 4:]).max()) <= step_of_codes
