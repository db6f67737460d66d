"""Records as earlier versions wrote them, and records that are changed behind the digest's back."""

import json

from qpaged._files import digest


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
