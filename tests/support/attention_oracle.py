"""Attention in float64 NumPy, one query at a time, against which every backend is tested."""

import numpy as np


def attention(query, keys, values, position, table, scale, window=None, cap=None, sinks=None):
    """Return the attention of queries [n, q_heads, head_dim] at ``position`` [n], in their shape.

    ``keys`` and ``values`` are pools [kv_heads, pages, page_size, head_dim]; ``table`` is [n, pages].
    """
    out = np.zeros(query.shape)
    kv_heads, pages, page_size, _ = keys.shape
    group = query.shape[1] // kv_heads
    for i, p in enumerate(position):
        if p < 0 or p >= table.shape[1] * page_size:
            continue
        first = 0 if window is None else max(0, p - window + 1)
        slots = [(table[i, s // page_size], s % page_size) for s in range(first, p + 1)]
        slots = [(page, slot) for page, slot in slots if 0 <= page < pages]
        if not slots:
            continue
        for head in range(query.shape[1]):
            k = np.array([keys[head // group, page, slot] for page, slot in slots], np.float64)
            v = np.array([values[head // group, page, slot] for page, slot in slots], np.float64)
            scores = scale * k.reshape(len(slots), -1) @ query[i, head].astype(np.float64)
            if cap is not None:
                scores = cap * np.tanh(scores / cap)
            sink = -np.inf if sinks is None else sinks[head]
            largest = max(scores.max(), sink)
            weights = np.exp(scores - largest)
            out[i, head] = weights @ v / (weights.sum() + np.exp(sink - largest))
    return out
