"""Attention in float64 NumPy, one query at a time, which every backend is compared with."""

import numpy as np


def attention(
    query,  # [tokens, q_heads, head_dim]
    keys,  # [kv_heads, num_pages, page_size, head_dim]
    values,  # [kv_heads, num_pages, page_size, head_dim]
    positions,  # [tokens]
    table,  # [tokens, pages]
    scale,
    window=None,
    cap=None,
    sinks=None,  # [q_heads]
):
    """Return the attention of each query, [tokens, q_heads, head_dim]."""
    out = np.zeros(query.shape)
    kv_heads, num_pages, page_size, _ = keys.shape
    q_heads_per_kv = query.shape[1] // kv_heads
    for token, position in enumerate(positions):
        if position < 0 or position >= table.shape[1] * page_size:
            continue
        first = 0 if window is None else max(0, position - window + 1)
        slots = [(table[token, s // page_size], s % page_size) for s in range(first, position + 1)]
        slots = [(page, slot) for page, slot in slots if 0 <= page < num_pages]
        if not slots:
            continue
        for q_head in range(query.shape[1]):
            kv_head = q_head // q_heads_per_kv
            k = np.array([keys[kv_head, page, slot] for page, slot in slots], np.float64)
            v = np.array([values[kv_head, page, slot] for page, slot in slots], np.float64)
            scores = scale * k @ query[token, q_head].astype(np.float64)
            if cap is not None:
                scores = cap * np.tanh(scores / cap)
            sink = -np.inf if sinks is None else sinks[q_head]
            highest = max(scores.max(), sink)
            weights = np.exp(scores - highest)
            out[token, q_head] = weights @ v / (weights.sum() + np.exp(sink - highest))
    return out
