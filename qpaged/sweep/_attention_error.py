"""How far attention over a format's pages is from attention over plain ones, layer by layer.

Each layer is given the plain run's own queries, keys and values, so that its error is its own and not what
earlier layers handed on.
"""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qpaged.attention import paged_attention
from qpaged.cache import PagedAttentionCacheView, PagedAttentionMetadata
from qpaged.models import LlamaConfig, Params, forward
from qpaged.sweep._model import Model
from qpaged.sweep._settings import Settings
from qpaged.sweep._stream import BACKEND, chunks, make_cache, reset


@dataclass(frozen=True)
class Probe:
    """What attention saw and gave in one chunk of the plain run: arrays (layers, chunk, heads, head_dim)."""

    sequence: int
    start: int
    length: int
    query: jax.Array
    key: jax.Array
    value: jax.Array
    out: jax.Array


def plain_probes(model: Model, tokens: np.ndarray, settings: Settings) -> list[Probe]:
    """Probes of a plain float32 run over the first sequences of ``tokens`` (sequences, context)."""
    probes = []
    cache = make_cache(model, None, jnp.float32, settings, 1)
    table = np.arange(settings.pages_per_sequence, dtype=np.int32)
    for sequence in range(min(settings.probed, len(tokens))):
        cache = reset(cache, table)
        for start, length, part in chunks(tokens[sequence], settings.context, settings.chunk):
            cache, seen = _probe_step(model.params, cache, model.config, part, start, length, table)
            probes.append(Probe(sequence, start, length, *seen))
    return probes


def attention_error(
    model: Model, probes: list[Probe], format: Any, dtype: Any, settings: Settings
) -> list[float]:
    """||out - plain out|| / ||plain out|| of each layer, over all tokens, heads and channels."""
    cache = make_cache(model, format, dtype, settings, 1)
    return [_layer_error(view, probes, index) for index, view in enumerate(cache.views)]


def _layer_error(view: PagedAttentionCacheView, probes: list[Probe], layer: int) -> float:
    view = view.replace(layer_index=0)  # static: layers of one format share one compilation
    table = np.arange(view.metadata.num_pages_per_layer, dtype=np.int32)
    error, total = 0.0, 0.0
    for probe in probes:
        if probe.start == 0:
            view = _reset_view(view, table)
        rows = probe.query[layer], probe.key[layer], probe.value[layer]
        view, out = _attend(view, *rows, probe.start, probe.length, table)
        plain = np.asarray(probe.out[layer], np.float64)[: probe.length]
        error += float(np.square(np.asarray(out, np.float64)[: probe.length] - plain).sum())
        total += float(np.square(plain).sum())
    return float(np.sqrt(error / total)) if total else 0.0


@functools.partial(jax.jit, donate_argnums=0)
def _reset_view(view: PagedAttentionCacheView, pages: jax.Array) -> PagedAttentionCacheView:
    return view.reset_pages(pages)


@functools.partial(jax.jit, donate_argnums=0)
def _attend(view: PagedAttentionCacheView, query, key, value, start, length, table):
    position = start + jnp.arange(len(query), dtype=jnp.int32)
    metadata = PagedAttentionMetadata.prefill(position=position, page_table=table, length=length)
    view = view.write_prefill_to_cache(key, value, metadata)
    return view, paged_attention(query, view, metadata, backend=BACKEND)


@functools.partial(jax.jit, static_argnums=2, donate_argnums=1)
def _probe_step(params: Params, cache: Any, config: LlamaConfig, tokens, start, length, table):
    """(cache, (query, key, value, out)), each stacked over the layers."""
    position = start + jnp.arange(len(tokens), dtype=jnp.int32)
    metadata = PagedAttentionMetadata.prefill(position=position, page_table=table, length=length)
    views, seen = list(cache.views), []

    def attend(layer, query, key, value):
        views[layer] = views[layer].write_prefill_to_cache(key, value, metadata)
        out = paged_attention(query, views[layer], metadata, backend=BACKEND)
        seen.append((query, key, value, out))
        return out

    forward(params, config, tokens, position, attend)
    stacked = tuple(jnp.stack(parts) for parts in zip(*seen, strict=True))
    return cache.replace(views=views), stacked
