"""An allocator as plain JSON, and back."""

from collections.abc import Hashable, Mapping
from dataclasses import asdict
from typing import Any

from qpaged.cache._allocator import PageAllocator
from qpaged.cache._config import PagedAttentionCacheMetaData
from qpaged.cache._sequence_pages import SequencePages


def allocator_to_record(allocator: PageAllocator) -> dict[str, Any]:
    """Return all of an allocator but its metadata.

    Raises:
        TypeError: a sequence is named by what JSON does not hold.
        ValueError: changes of it are not applied yet.
    """
    with allocator._lock:
        if allocator._pages.has_changes:
            raise ValueError(
                "allocator must have no changes that the cache lacks, but has some; apply them first: "
                "cache.apply_changes(allocator.take_changes())."
            )
        sequences = []
        for name, held in allocator._sequences.items():
            fields = asdict(held)
            fields["root"] = held.root.hex()
            fields["hashes"] = [page_hash.hex() for page_hash in held.hashes]
            sequences.append([_name_to_record(name), fields])
        return {
            "salt": allocator.salt,
            "devices": allocator.devices,
            "sequences": sequences,
            "pages": allocator._pages.to_record(),
            "pinned": sorted(allocator._pinned),
            "looked_up": allocator._looked_up,
            "matched": allocator._matched,
        }


def allocator_of_record(metadata: PagedAttentionCacheMetaData, record: Mapping[str, Any]) -> PageAllocator:
    """Return the allocator that :func:`allocator_to_record` wrote."""
    allocator = PageAllocator(metadata, record["salt"], record["devices"])
    holders = [0] * metadata.num_pages_per_layer
    for name, fields in record["sequences"]:
        root, hashes = bytes.fromhex(fields["root"]), list(map(bytes.fromhex, fields["hashes"]))
        held = SequencePages(**{**fields, "root": root, "hashes": hashes})
        allocator._sequences[_name_of_record(name)] = held
        for page in held.pages:
            if page is not None:
                holders[page] += 1
    for page in record["pinned"]:
        holders[page] += 1
    allocator._pinned = set(record["pinned"])
    allocator._looked_up, allocator._matched = record["looked_up"], record["matched"]
    allocator._pages.restore(record["pages"], holders)
    return allocator


def _name_to_record(name: Hashable) -> Any:
    """Return a sequence's name as JSON: a string, an integer, or a list for a tuple of them."""
    if isinstance(name, tuple):
        return [_name_to_record(part) for part in name]
    if type(name) in (str, int):
        return name
    raise TypeError(
        f"sequences must be named by strings, integers or tuples of these to be saved, but one is {name!r}; "
        f"give it another name."
    )


def _name_of_record(name: Any) -> Hashable:
    return tuple(map(_name_of_record, name)) if isinstance(name, list) else name
