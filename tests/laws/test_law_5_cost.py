"""Law 5: a write costs its rows, attention its lengths; nothing the size of the pool is ever made."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from formats import FORMATS

import qpaged

HEADS, PAGE_SIZE, HEAD_DIM, BATCH, Q_HEADS, PAGES_PER_SEQUENCE = 8, 16, 128, 8, 32, 64
MEGABYTE = 1_000_000
METHODS = qpaged.PagedAttentionCacheView
DECODE = qpaged.PagedAttentionMetadata.decode(
    position=np.arange(BATCH) * 100, page_table=np.zeros((BATCH, PAGES_PER_SEQUENCE), np.int32)
)
PREFILL = qpaged.PagedAttentionMetadata.prefill(
    position=np.arange(64), page_table=np.zeros(PAGES_PER_SEQUENCE, np.int32)
)


def abstract_view(format, pages, dtype=jnp.bfloat16):
    """A view of so many pages, none of them allocated."""
    config = qpaged.PagedAttentionCacheMetaData(
        BATCH, 1, pages, PAGES_PER_SEQUENCE, PAGES_PER_SEQUENCE * PAGE_SIZE, PAGE_SIZE, HEADS, HEAD_DIM, 0.5
    )
    quantizer = qpaged.get_quantizer(format)

    def pools():
        page = quantizer.quantize(jnp.zeros((1, 1, PAGE_SIZE, HEAD_DIM), dtype))
        pool = jax.tree_util.tree_map(lambda x: jnp.broadcast_to(x, (HEADS, pages, *x.shape[2:])), page)
        return METHODS(config, 0, pool, pool)

    return jax.eval_shape(pools)


def rows(count, heads=HEADS):
    return jax.ShapeDtypeStruct((count, heads, HEAD_DIM), jnp.bfloat16)


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


def arrays_in(jaxpr):
    """Every array that a jaxpr makes, those of the jaxprs inside it included."""
    for equation in jaxpr.eqns:
        yield from ((equation.primitive.name, var.aval) for var in equation.outvars)
        for inner in jax.tree_util.tree_leaves(list(equation.params.values()), is_leaf=is_jaxpr):
            if is_jaxpr(inner):
                yield from arrays_in(getattr(inner, "jaxpr", inner))


def is_jaxpr(value):
    return hasattr(value, "eqns")


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("format", FORMATS)
def test_no_float_of_the_pools_size(format, name):
    step, arguments = STEPS[name]
    pages = 4096
    made = list(arrays_in(jax.make_jaxpr(step)(abstract_view(format, pages), *arguments).jaxpr))
    assert len(made) > 10
    pool = HEADS * pages * PAGE_SIZE * HEAD_DIM
    large = [
        (primitive, aval.str_short())
        for primitive, aval in made
        if jnp.issubdtype(aval.dtype, jnp.floating) and aval.size >= pool // 4
    ]
    assert not large


def test_the_walk_sees_a_float_of_the_pools_size():
    view = abstract_view("int8", 4096)
    program = jax.make_jaxpr(
        lambda view: jax.lax.fori_loop(0, 2, lambda i, x: x + view.key_pages.materialize(), 0.0)
    )
    with pytest.raises(TypeError):  # a carry that changes its shape does not even trace
        program(view)
    made = arrays_in(jax.make_jaxpr(jax.jit(lambda view: view.key_pages.materialize().sum()))(view).jaxpr)
    assert any(
        aval.size == HEADS * 4096 * PAGE_SIZE * HEAD_DIM and aval.dtype == jnp.float32 for _, aval in made
    )


def temporaries(format, name, pages):
    step, arguments = STEPS[name]
    compiled = jax.jit(step, donate_argnums=0 if "write" in name or name == "reset" else ())
    analysis = compiled.lower(abstract_view(format, pages), *arguments).compile().memory_analysis()
    return analysis.temp_size_in_bytes


@pytest.mark.parametrize("format", FORMATS)
def test_a_decode_write_needs_no_memory_whatever_the_pool(format):
    assert temporaries(format, "decode write", 32_768) < MEGABYTE


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("format", ["raw", "int8", "int8:channel", "int8:token"])
def test_temporaries_do_not_grow_with_the_pool(format, name):
    assert temporaries(format, name, 32_768) <= temporaries(format, name, 512) + 4096


@pytest.mark.parametrize("format", FORMATS)
def test_a_donated_write_reuses_its_buffers(format):
    config = qpaged.PagedAttentionCacheMetaData(2, 1, 8, 4, 64, 16, 2, 32, 0.5)
    view = METHODS.init(None, jnp.bfloat16, config, 0, None, format)
    metadata = qpaged.PagedAttentionMetadata.decode(
        position=np.array([3, 20]), page_table=np.arange(8).reshape(2, 4)
    )
    before = [leaf.unsafe_buffer_pointer() for leaf in jax.tree_util.tree_leaves(view)]
    key = jnp.ones((2, 2, 32), jnp.bfloat16)
    after = jax.jit(METHODS.write_decodes_to_cache, donate_argnums=0)(view, key, key, metadata)
    assert [leaf.unsafe_buffer_pointer() for leaf in jax.tree_util.tree_leaves(after)] == before


def blocks_read(positions, **options):
    """Block reads of a decode, counted by running the backend's own bounds."""
    from qpaged.attention import _xla

    total = 0
    for position in positions:
        first, last = _xla._blocks(jnp.array([position], jnp.int32), _xla.BLOCK, options.get("window"))
        total += max(int(last) - int(first), 0)
    return total


def test_attention_reads_the_sum_of_the_lengths():
    assert blocks_read([4095]) == 8
    assert blocks_read([4095, 100, 100, -1]) == 8 + 1 + 1 + 0
    assert blocks_read([4095], window=512) <= 2
