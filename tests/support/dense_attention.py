"""Attention over one contiguous sequence in NumPy, which compiles nothing."""

import jax.numpy as jnp
import numpy as np


def dense_attention(options, query, key, value):
    """Return the causal attention of the last tokens, one for each query, to all; an `Attend` function."""
    query = np.asarray(query, np.float32)
    key = np.asarray(key, np.float32)
    value = np.asarray(value, np.float32)
    grouped = query.reshape(len(query), key.shape[1], -1, key.shape[2])
    scores = np.einsum("qkgd,skd->kgqs", grouped, key) * options.softmax_scale
    if options.logits_soft_cap is not None:
        scores = options.logits_soft_cap * np.tanh(scores / options.logits_soft_cap)
    distance = np.arange(len(key) - len(query), len(key))[:, None] - np.arange(len(key))
    visible = (distance >= 0) & (distance < (options.sliding_window or len(key)))
    weights = np.exp(np.where(visible, scores - scores.max(axis=-1, keepdims=True), -np.inf))
    weights /= weights.sum(axis=-1, keepdims=True)
    return jnp.asarray(np.einsum("kgqs,skd->qkgd", weights, value).reshape(query.shape))
