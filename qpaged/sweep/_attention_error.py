"""How far attention over a format's pages is from attention over plain ones, layer by layer.

Each layer is given the plain run's own queries, keys and values, so that its error is its own and not what
earlier layers handed on.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from qpaged.cache import PagedAttentionCache, PagedAttentionCacheView
from qpaged.models import forward
from qpaged.sweep._model import Model
from qpaged.sweep._settings import Settings
from qpaged.sweep._stream import Chunk, chunks, reset, reset_view, through_cache

Seen = tuple[jax.Array, jax.Array, jax.Array, jax.Array]
"""A layer's query, key and value, and what attention made of them: each (chunk, its heads, head_dim)."""


@dataclass(frozen=True)
class Probe:
    """What the attention of each layer saw and gave in one chunk of the plain run."""

    chunk: Chunk
    layers: list[Seen]


def plain_probes(
    model: Model, cache: PagedAttentionCache, tokens: np.ndarray, settings: Settings
) -> list[Probe]:
    """Probes of a run over the first sequences of ``tokens`` (sequences, context); donates ``cache``."""
    probes, table = [], _table(cache.views[0])
    for sequence in tokens[: settings.probed]:
        cache = reset(cache, table)
        for chunk in chunks(sequence, settings.context, settings.chunk):
            cache, probe = _probe(model, cache, chunk, table)
            probes.append(probe)
    return probes


def attention_error(cache: PagedAttentionCache, probes: list[Probe]) -> list[float]:
    """||out - plain out|| / ||plain out|| of each layer, over all tokens, heads and channels.

    Donates ``cache``.
    """
    return [_layer_error(view, probes) for view in cache.views]


def _probe(
    model: Model, cache: PagedAttentionCache, chunk: Chunk, table: np.ndarray
) -> tuple[PagedAttentionCache, Probe]:
    metadata = chunk.metadata(table)
    views, layers = list(cache.views), []

    def attend(layer, query, key, value):
        views[layer], out = through_cache(views[layer], query, key, value, metadata)
        layers.append((query, key, value, out))
        return out

    forward(model.params, model.config, jnp.asarray(chunk.tokens), metadata.prefill_position, attend)
    return cache.replace(views=views), Probe(chunk, layers)


def _layer_error(view: PagedAttentionCacheView, probes: list[Probe]) -> float:
    table = _table(view)
    error, total = 0.0, 0.0
    for probe in probes:
        if probe.chunk.start == 0:
            view = reset_view(view, table)
        query, key, value, plain = probe.layers[view.layer_index]
        view, out = through_cache(view, query, key, value, probe.chunk.metadata(table))
        expected, found = (np.asarray(x, np.float64)[: probe.chunk.length] for x in (plain, out))
        error += float(np.square(found - expected).sum())
        total += float(np.square(expected).sum())
    return float(np.sqrt(error / total)) if total else 0.0


def _table(view: PagedAttentionCacheView) -> np.ndarray:
    """The page table of a sequence that has the first pages."""
    return np.arange(view.metadata.num_pages_per_sequence, dtype=np.int32)
