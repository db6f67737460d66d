"""Attention in float64 NumPy, one query at a time: what every backend is held to."""

import numpy as np


def attention(query, keys, values, position, table, scale, window=None, cap=None, sinks=None):
    """(n, q_heads, head_dim) for queries (n, q_heads, head_dim) at ``position`` (n,).

    ``keys`` and ``values`` are pools (kv_heads, pages, page_size, head_dim); ``table`` is (n, pages).
    """
    out = np.zeros(query.shape)
    kv_heads, pages, page_size, _ = keys.shape
    group = query.shape[1] // kv_heads
    for i, p in enumerate(position):
        if p < 0 or p >= table.shape[1] * page_size:
            continue
        lowest = 0 if window is None else max(0, p - window + 1)
        places = [(table[i, s // page_size], s % page_size) for s in range(lowest, p + 1)]
        places = [(page, slot) for page, slot in places if 0 <= page < pages]
        for head in range(query.shape[1]):
            k = np.array([keys[head // group, page, slot] for page, slot in places], np.float64)
            v = np.array([values[head // group, page, slot] for page, slot in places], np.float64)
            scores = scale * k.reshape(len(places), -1) @ query[i, head].astype(np.float64)
            if cap is not None:
                scores = cap * np.tanh(scores / cap)
            if not places:
                continue
            top = max(scores.max(), -np.inf if sinks is None else sinks[head])
            weights = np.exp(scores - top)
            total = weights.sum() + (0 if sinks is None else np.exp(sinks[head] - top))
            out[i, head] = weights @ v / total
    return out
