"""Caches in files: a cache saved whole, and pages of prompts by the hashes of their tokens."""

from qpaged.storage._cache import SavedCache, load, save
from qpaged.storage._prefix_store import PrefixStore

__all__ = ["PrefixStore", "SavedCache", "load", "save"]
