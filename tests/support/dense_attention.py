"""Attention over one whole sequence, in NumPy: nothing to compile."""

import jax.numpy as jnp
import numpy as np


def dense_attention(options, query, key, value):
    """Causal grouped-query attention of the last tokens, as many as there are queries, to all (`Attend`)."""
    query, key, value = (np.asarray(x, np.float32) for x in (query, key, value))
    grouped = query.reshape(len(query), key.shape[1], -1, key.shape[2])
    scores = np.einsum("qkgd,skd->kgqs", grouped, key) * options.softmax_scale
    if options.logits_soft_cap is not None:
        scores = options.logits_soft_cap * np.tanh(scores / options.logits_soft_cap)
    behind = np.arange(len(key) - len(query), len(key))[:, None] - np.arange(len(key))
    seen = (behind >= 0) & (behind < (options.sliding_window or len(key)))
    weights = np.exp(np.where(seen, scores - scores.max(axis=-1, keepdims=True), -np.inf))
    weights /= weights.sum(axis=-1, keepdims=True)
    return jnp.asarray(np.einsum("kgqs,skd->qkgd", weights, value).reshape(query.shape))
