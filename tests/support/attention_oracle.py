"""Attention in float64 NumPy, one query at a time, which every backend is compared with."""

import numpy as np


def attention(*arguments, **options):
    """Return the attention of each query, [tokens, q_heads, head_dim], as :func:`attention_and_lse` does."""
    out, _ = attention_and_lse(*arguments, **options)
    return out


def attention_and_lse(
    query,  # [tokens, q_heads, head_dim]
    keys,  # [kv_heads, num_pages, page_size, head_dim]
    values,  # [kv_heads, num_pages, page_size, head_dim]
    positions,  # [tokens]
    table,  # [tokens, pages]
    scale,
    window=None,
    cap=None,
    sinks=None,  # [q_heads]
    until=None,  # [tokens], the last position that each query sees, if beyond its own
    slopes=None,  # [q_heads]
):
    """Return attention [tokens, q_heads, head_dim] and log-sum-exps [tokens, q_heads]."""
    out, lse = np.zeros(query.shape), np.full(query.shape[:2], -np.inf)
    kv_heads, num_pages, page_size, _ = keys.shape
    q_heads_per_kv = query.shape[1] // kv_heads
    for token, position in enumerate(positions):
        if position < 0 or position >= table.shape[1] * page_size:
            continue
        first = 0 if window is None else max(0, position - window + 1)
        last = position if until is None else max(position, until[token])
        seen = [s for s in range(first, last + 1) if 0 <= table[token, s // page_size] < num_pages]
        slots = [(table[token, s // page_size], s % page_size) for s in seen]
        if not slots:
            continue
        distance = np.abs(np.array(seen) - position)
        for q_head in range(query.shape[1]):
            kv_head = q_head // q_heads_per_kv
            k = np.array([keys[kv_head, page, slot] for page, slot in slots], np.float64)
            v = np.array([values[kv_head, page, slot] for page, slot in slots], np.float64)
            scores = scale * k @ query[token, q_head].astype(np.float64)
            if cap is not None:
                scores = cap * np.tanh(scores / cap)
            if slopes is not None:
                scores = scores - slopes[q_head] * distance
            sink = -np.inf if sinks is None else sinks[q_head]
            highest = max(scores.max(), sink)
            weights = np.exp(scores - highest)
            total = weights.sum() + np.exp(sink - highest)
            out[token, q_head] = weights @ v / total
            lse[token, q_head] = highest + np.log(total)
    return out, lse
