"""The tokens that a write drops are named, with the reason; the others are those that it writes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qpaged

CONFIG = qpaged.PagedAttentionCacheMetaData(
    batch_size=1,
    num_hidden_layers=1,
    num_pages_per_layer=6,
    num_pages_per_sequence=2,
    max_sequences=2,
    page_size=4,
    num_kv_heads=1,
    kv_head_dim_size=8,
    hbm_utilization=0.9,
)
DECODES = [  # position, page table, and the reason why it is dropped
    (0, [2, 3], None),
    (7, [2, 3], None),
    (-1, [2, 3], "its position is negative, as of an inactive row"),
    (8, [2, 3], "its page table has 2 pages of 4 tokens, which end at 8"),
    (5, [2, 6], "entry 1 of its page table is 6, which means no page"),
    (5, [2, 7], "entry 1 of its page table is 7, but a layer has pages 0 to 5"),
    (1, [-1, 5], "entry 0 of its page table is -1, but a layer has pages 0 to 5"),
]


def decode_step():
    positions, tables, _ = zip(*DECODES, strict=True)
    return qpaged.PagedAttentionMetadata.decode(position=list(positions), page_table=list(tables))


def test_dropped_rows_of_a_decode_have_reasons():
    dropped = qpaged.dropped_tokens(decode_step(), CONFIG)
    want = [(row, position, why) for row, (position, _, why) in enumerate(DECODES) if why]
    assert [(token.index, token.position, token.reason) for token in dropped] == want
    assert str(dropped[1]) == f"decode token 3 at position 8: {DECODES[3][2]}"


def test_the_tokens_of_a_prefill_but_for_its_padding():
    step = qpaged.PagedAttentionMetadata.prefill(position=np.arange(6, 12), page_table=[4, 5], length=4)
    assert [token.index for token in qpaged.dropped_tokens(step, CONFIG)] == [2, 3]
    assert {token.mode for token in qpaged.dropped_tokens(step, CONFIG)} == {"prefill"}


def test_the_tokens_of_a_ragged_batch_but_for_its_padding():
    step = qpaged.PagedAttentionMetadata.ragged(
        position=[3, 4, 7, 8, 0, 0], page_tables=[[2, 6], [4, 5], [1, 1]], starts=[0, 2, 5, 5]
    )
    dropped = qpaged.dropped_tokens(step, CONFIG)
    assert [(token.mode, token.index, token.position) for token in dropped] == [
        ("ragged", 1, 4),
        ("ragged", 3, 8),
    ]


def test_a_placeholder_drops_nothing():
    assert qpaged.dropped_tokens(qpaged.PagedAttentionMetadata.init_empty(), CONFIG) == []


@pytest.mark.parametrize("row", range(len(DECODES)))
def test_writes_agree(row):
    position, table, reason = DECODES[row]
    step = qpaged.PagedAttentionMetadata.decode(position=[position], page_table=[table])
    view = qpaged.PagedAttentionCacheView.init(None, jnp.float32, CONFIG, 0)
    rows = jnp.ones((1, 1, 8))
    written = np.asarray(view.write_decodes_to_cache(rows, rows, step).key_pages).any()
    assert bool(written) == (not qpaged.dropped_tokens(step, CONFIG)) == (reason is None)


def test_inside_jit_by_a_callback():
    seen = []

    @jax.jit
    def run(step):
        jax.debug.callback(lambda step: seen.extend(qpaged.dropped_tokens(step, CONFIG)), step)
        return step.decodes_position + 1

    jax.block_until_ready(run(decode_step()))
    jax.effects_barrier()
    assert len(seen) == 5
