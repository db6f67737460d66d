"""Records as earlier versions wrote them, and records that are changed behind the digest's back."""

import functools
import json

import numpy as np

from qpaged._files import digest
from support.caches import fresh, prefill, tokens, write_prefill

TABLE = np.array([3, 1, 5, 7])


def with_digest(record):
    """Return the text of a record with the digest of its content: a digest must not hide a missing check."""
    return json.dumps(record | {"digest": digest(record)})


def first_version(record):
    """Return a record as the first version wrote it: without a digest and without the names of arrays."""
    if isinstance(record, list):
        return [first_version(part) for part in record]
    if not isinstance(record, dict):
        return record
    dropped = {"digest"} | ({"name"} if record.get("type") == "array" else set())
    parts = {key: first_version(part) for key, part in record.items() if key not in dropped}
    return parts | ({"version": 1} if "version" in parts else {})


@functools.cache
def filled(format=None):
    """Return a view with a prefill of eight tokens at the pages of TABLE."""
    key, value = tokens(8)
    return write_prefill(fresh(format), key, value, prefill(np.arange(8), TABLE))
