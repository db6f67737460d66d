"""Attention over paged caches: the reference that defines it, and a file for each backend."""

from qpaged.attention._api import attention_backends, paged_attention
from qpaged.attention._backends import AttentionBackend
from qpaged.attention._merge import merge_attention

__all__ = ["AttentionBackend", "attention_backends", "merge_attention", "paged_attention"]
