"""Attention over one sequence without a cache, in NumPy, so that there is nothing to compile."""

import jax.numpy as jnp
import numpy as np


def dense_attention(options, query, key, value):
    """Compute causal grouped-query attention (`Attend`): the queries are of the last tokens."""
    query = np.asarray(query, np.float32)
    key = np.asarray(key, np.float32)
    value = np.asarray(value, np.float32)
    grouped = query.reshape(len(query), key.shape[1], -1, key.shape[2])
    scores = np.einsum("qkgd,skd->kgqs", grouped, key) * options.softmax_scale
    if options.logits_soft_cap is not None:
        scores = options.logits_soft_cap * np.tanh(scores / options.logits_soft_cap)
    query_positions = np.arange(len(key) - len(query), len(key))
    distance = query_positions[:, None] - np.arange(len(key))
    visible = (distance >= 0) & (distance < (options.sliding_window or len(key)))
    weights = np.exp(np.where(visible, scores - scores.max(axis=-1, keepdims=True), -np.inf))
    weights /= weights.sum(axis=-1, keepdims=True)
    return jnp.asarray(np.einsum("kgqs,skd->qkgd", weights, value).reshape(query.shape))
