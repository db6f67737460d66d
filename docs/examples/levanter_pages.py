"""levanter's inference engine on the pages of qpaged, its source untouched.

with pages_of("int8", engine_config):
    engine = InferenceEngine.from_model_with_config(model, tokenizer, engine_config)
    engine.generate(requests)
"""

import contextlib
from unittest import mock

import jax.numpy as jnp
from haliax import NamedArray
from levanter.layers import attention
from levanter.layers.kv_cache import PageCache

import qpaged


class Pages(PageCache):
    """The pages of a layer, in place of levanter's own."""

    view: qpaged.PagedAttentionCacheView

    @property
    def kv_pages(self):
        return self  # levanter hands it on to its attention

    def update(self, batch, key, value):
        step = ragged(
            batch.seq_lens, batch.page_indices, batch.cu_q_lens.array, batch.num_seqs, len(key.array)
        )
        page, slot = (part.array for part in batch.pages_and_slots())
        # The engine allots pages within its program, so the first slot of a page tells that it is new.
        view = self.view.reset_pages(jnp.where(slot == 0, page, self.view.metadata.num_pages_per_layer))
        return Pages(view.write_to_cache(key.array, value.array, step))

    def copy_page(self, source, target):
        return Pages(self.view.copy_pages(source, target))


def ragged(lengths, tables, starts, sequences, tokens):
    """Return the step that levanter describes by lengths [seq], tables [seq, page] and starts [seq + 1]."""
    lengths, tables = lengths.array, tables.array
    starts = starts[jnp.minimum(jnp.arange(len(starts)), sequences)]
    row = jnp.searchsorted(starts[1:], jnp.arange(tokens), side="right")
    position = jnp.arange(tokens) - starts[row + 1] + lengths[row]
    position = jnp.where(jnp.arange(tokens) < starts[-1], position, -1)
    return qpaged.PagedAttentionMetadata.ragged(position=position, page_tables=tables, starts=starts)


def attend(query, pages, lengths, tables, starts, sequences, sm_scale=1.0, soft_cap=None):
    """Do what levanter's ``ragged_paged_attention`` does."""
    query = query.rearrange(("position", "kv_head", "q_heads_per_group", "head_size"))
    flat = query.array.reshape(len(query.array), -1, query.array.shape[-1])
    step = ragged(lengths, tables, starts.array, sequences, len(flat))
    out = qpaged.paged_attention(flat, pages.view, step, softmax_scale=sm_scale, logits_soft_cap=soft_cap)
    return NamedArray(out.reshape(query.array.shape), query.axes)


@contextlib.contextmanager
def pages_of(quantizer, config):
    """Give engines that are made and run within pages of a format; ``config`` is their InferenceEngineConfig.

    What was compiled for a model with other pages is used again: call ``jax.clear_caches()`` in between.
    """

    def init(spec, kv_heads, head_size, dtype):
        metadata = qpaged.PagedAttentionCacheMetaData(
            batch_size=config.max_seqs,
            num_hidden_layers=1,
            num_pages_per_layer=spec.num_pages,
            num_pages_per_sequence=config.max_pages_per_seq,
            max_sequences=config.max_seq_len,
            page_size=spec.page_size,
            num_kv_heads=kv_heads.size,
            kv_head_dim_size=head_size.size,
            hbm_utilization=config.hbm_utilization,
        )
        return Pages(qpaged.PagedAttentionCacheView.init(None, dtype, metadata, 0, None, quantizer))

    cache = mock.Mock(init=init)
    with mock.patch.multiple(attention, KvPageCache=cache, ragged_paged_attention=attend):
        yield
