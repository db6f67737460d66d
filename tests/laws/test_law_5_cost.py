"""Law 5: a write costs its rows, attention its lengths; no step makes a float of the pool's size."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.long import first_short

import qpaged
from qpaged.attention import _xla_tiles
from qpaged.testing._laws_cost import arrays_in

HEADS, PAGE_SIZE, HEAD_DIM, BATCH, Q_HEADS, PAGES_PER_SEQUENCE = 8, 16, 128, 8, 32, 64
METHODS = qpaged.PagedAttentionCacheView
DECODE = qpaged.PagedAttentionMetadata.decode(
    position=np.arange(BATCH) * 100, page_table=np.zeros((BATCH, PAGES_PER_SEQUENCE), np.int32)
)
PREFILL = qpaged.PagedAttentionMetadata.prefill(
    position=np.arange(64), page_table=np.zeros(PAGES_PER_SEQUENCE, np.int32)
)


def abstract_view(format, pages, dtype=jnp.bfloat16):
    """Return a view of ``pages`` pages without allocating them."""
    config = qpaged.PagedAttentionCacheMetaData(
        BATCH, 1, pages, PAGES_PER_SEQUENCE, PAGES_PER_SEQUENCE * PAGE_SIZE, PAGE_SIZE, HEADS, HEAD_DIM, 0.5
    )
    return jax.eval_shape(lambda: METHODS.fresh(None, dtype, config, 0, None, format))


def rows(count, heads=HEADS):
    """Return the shape of keys or queries."""
    return jax.ShapeDtypeStruct((count, heads, HEAD_DIM), jnp.bfloat16)


# Beside these, the kit tests a decode of every format.
FORMATS = ("raw", "int8", "int4:channel", "int8:token")
STEPS = {
    "decode write": (METHODS.write_decodes_to_cache, (rows(BATCH), rows(BATCH), DECODE)),
    "prefill write": (METHODS.write_prefill_to_cache, (rows(64), rows(64), PREFILL)),
    "reset": (METHODS.reset_pages, (jax.ShapeDtypeStruct((8,), jnp.int32),)),
    "decode attention": (
        lambda view, q, m: qpaged.paged_attention(q, view, m),
        (rows(BATCH, Q_HEADS), DECODE),
    ),
    "prefill attention": (
        lambda view, q, m: qpaged.paged_attention(q, view, m),
        (rows(64, Q_HEADS), PREFILL),
    ),
}


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("format", FORMATS)
def test_no_step_makes_a_float_of_the_pools_size(format, name):
    step, arguments = STEPS[name]
    pages = 4096
    arrays = list(arrays_in(jax.make_jaxpr(step)(abstract_view(format, pages), *arguments).jaxpr))
    assert len(arrays) > 5
    pool = HEADS * pages * PAGE_SIZE * HEAD_DIM
    large = [
        (primitive, aval.str_short())
        for primitive, aval in arrays
        if jnp.issubdtype(aval.dtype, jnp.floating) and aval.size >= pool // 4
    ]
    assert not large


def test_arrays_inside_loops_and_jits_are_found():
    def program(view):
        """Materialize the pool inside a jit inside a loop."""
        body = jax.jit(lambda i, total: total + view.key_pages.materialize().astype(jnp.float32).sum())
        return jax.lax.fori_loop(0, 2, body, jnp.float32(0))

    arrays = arrays_in(jax.make_jaxpr(program)(abstract_view("int8", 4096)).jaxpr)
    pool = HEADS * 4096 * PAGE_SIZE * HEAD_DIM
    assert any(aval.size == pool and aval.dtype == jnp.float32 for _, aval in arrays)


def temporaries(format, name, pages):
    """Return the bytes of temporaries that a step takes, its view donated if it returns one."""
    step, arguments = STEPS[name]
    compiled = jax.jit(step, donate_argnums=0 if "write" in name or name == "reset" else ())
    analysis = compiled.lower(abstract_view(format, pages), *arguments).compile().memory_analysis()
    return analysis.temp_size_in_bytes


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("format", first_short(3, FORMATS))
def test_temporaries_do_not_grow_with_the_pool(format, name):
    assert temporaries(format, name, 32_768) <= temporaries(format, name, 512) + 4096


def blocks_read(monkeypatch, lengths, **options):
    """Return how many blocks of keys a decode over sequences of these lengths reads, in plain JAX."""
    reads = []

    def counted(pool, pages):
        jax.debug.callback(lambda: reads.append(1))
        return gather_slots(pool, pages)

    gather_slots = _xla_tiles.gather_slots
    config = qpaged.PagedAttentionCacheMetaData(len(lengths), 1, 64, 64, 4096, 64, 1, 16, 0.5)
    view = METHODS.init(None, jnp.float32, config, 0, None, "int8")
    table = np.tile(np.arange(64), (len(lengths), 1))
    metadata = qpaged.PagedAttentionMetadata.decode(position=np.array(lengths) - 1, page_table=table)
    with monkeypatch.context() as patched:
        patched.setattr(_xla_tiles, "gather_slots", counted)
        jax.block_until_ready(
            qpaged.paged_attention(jnp.ones((len(lengths), 1, 16)), view, metadata, backend="xla", **options)
        )
        jax.effects_barrier()
    assert len(reads) % 2 == 0  # keys and values
    return len(reads) // 2


def test_attention_reads_the_sum_of_the_lengths(monkeypatch):
    long = 16 * _xla_tiles.KV_TILE
    assert blocks_read(monkeypatch, [long]) == 16
    assert blocks_read(monkeypatch, [long, 100, 100, 0]) == 16 + 1 + 1 + 0
    assert blocks_read(monkeypatch, [long], sliding_window=_xla_tiles.KV_TILE) == 1
