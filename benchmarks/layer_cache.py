"""One layer's cache at a named shape: empty, or filled with given keys and values."""

import warnings
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from shapes import Shape

import qpaged

CHUNK = 2048  # tokens that one prefill writes


def empty_view(quantizer: str, shape: Shape, pages: int) -> qpaged.PagedAttentionCacheView:
    """Return a bfloat16 view of ``pages`` pages in which nothing is written."""
    config = qpaged.PagedAttentionCacheMetaData(
        batch_size=len(shape.lengths),
        num_hidden_layers=1,
        num_pages_per_layer=pages,
        num_pages_per_sequence=shape.pages_per_sequence,
        max_sequences=shape.pages_per_sequence * shape.page_size,
        page_size=shape.page_size,
        num_kv_heads=shape.kv_heads,
        kv_head_dim_size=shape.head_dim,
        hbm_utilization=0.5,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", qpaged.NarrowFloatPoolWarning)
        return qpaged.PagedAttentionCacheView.init(None, jnp.bfloat16, config, 0, None, quantizer)


def filled_view(
    quantizer: str,
    shape: Shape,
    keys: Sequence[ArrayLike],  # for each sequence [kv_heads, length, head_dim]
    values: Sequence[ArrayLike],
) -> qpaged.PagedAttentionCacheView:
    """Return a view that holds these keys and values, on the pages of ``shape.tables()``."""
    table, pages = shape.tables()
    write = jax.jit(qpaged.PagedAttentionCacheView.write_prefill_to_cache, donate_argnums=0)
    view = empty_view(quantizer, shape, pages)
    for sequence, length in enumerate(shape.lengths):
        for start in range(0, length, CHUNK):
            key = token_rows(keys[sequence], start)
            value = token_rows(values[sequence], start)
            metadata = qpaged.PagedAttentionMetadata.prefill(
                position=start + np.arange(len(key)), page_table=table[sequence]
            )
            view = write(view, key, value, metadata)
    return view


def token_rows(heads: ArrayLike, start: int) -> jax.Array:
    """Return a chunk of [kv_heads, length, head_dim] as rows [tokens, kv_heads, head_dim], bfloat16."""
    return jnp.asarray(heads[:, start : start + CHUNK].swapaxes(0, 1), jnp.bfloat16)


def decode_metadata(shape: Shape) -> qpaged.PagedAttentionMetadata:
    """Return the metadata of a decode step at the last token of each sequence."""
    table, _ = shape.tables()
    return qpaged.PagedAttentionMetadata.decode(position=np.array(shape.lengths) - 1, page_table=table)


def stored_bytes_per_element(view: qpaged.PagedAttentionCacheView) -> float:
    """Return the bytes that keys and values take per element, scales included."""
    stored = view.key_pages.nbytes + view.value_pages.nbytes
    return stored / (view.key_pages.size + view.value_pages.size)
