"""Saves a cache to a directory, and loads it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from qpaged import pools
from qpaged._arguments import check_type
from qpaged.cache import (
    PageAllocator,
    PagedAttentionCache,
    PagedAttentionCacheMetaData,
    allocator_of_record,
    allocator_to_record,
    pages_in_use,
)
from qpaged.cache._sharding import Resolver
from qpaged.formats import CacheFormat
from qpaged.storage import _parts
from qpaged.storage._directory import Tensors, read_file, read_manifest, write_directory

KIND, VERSION = "cache in pages", 1
BATCH_BYTES = 2**25  # of a file of pages, and so of what is in memory beside the cache


class SavedCache(NamedTuple):
    """What :func:`load` returns.

    Attributes:
        cache: as it was saved.
        allocator: of its pages; None if it was saved without.
    """

    cache: PagedAttentionCache
    allocator: PageAllocator | None


def save(path: str | Path, cache: PagedAttentionCache, allocator: PageAllocator | None = None) -> None:
    """Write a cache to a directory: codes, scales and exact rows, bit for bit.

    Files of some 32 MB are written one after the other, each with its digest, and the last step replaces the
    manifest that names them: whatever interrupts it, the directory holds the cache that was saved before, or
    this one.

    Args:
        path: a new directory, an empty one, or one that a cache was saved to.
        cache: all of whose layers are there.
        allocator: of its pages; only those in use are saved then, and it is saved, too. Sequences must be
            named by strings, integers, or tuples of these.

    Raises:
        TypeError: a cache of pages that only their class can write, or another name of a sequence.
        ValueError: an allocator of another cache, or whose changes were not applied; or a directory that
            holds other files.
        OSError: the files cannot be written, or another process writes to them now.
        ImportError: the extra ``files`` is not installed.
    """
    check_type("cache", cache, PagedAttentionCache, "a qpaged.PagedAttentionCache", "give that of all layers")
    metadata = cache.views[0].metadata
    pages = np.arange(metadata.num_pages_per_layer, dtype=np.int32)
    record: dict[str, Any] = {"qpaged": KIND, "version": VERSION, "allocator": None}
    if allocator is not None:
        check_type("allocator", allocator, PageAllocator, "a qpaged.PageAllocator", "or None")
        if allocator.metadata != metadata:
            raise ValueError("allocator must be that of the cache, but was made with another metadata.")
        record["allocator"] = allocator_to_record(allocator)
        pages = pages_in_use(allocator)
    record["metadata"] = metadata.to_dict()
    record["dtype"] = jnp.dtype(cache.views[0].key_pages.dtype).name
    record["format"] = _format_of(cache).config
    pages_of_file = max(1, BATCH_BYTES * metadata.num_pages_per_layer // cache.nbytes)
    batches = [pages[start : start + pages_of_file] for start in range(0, len(pages), pages_of_file)]
    record["pages"] = [batch.tolist() for batch in batches]
    write_directory(Path(path), record, _files(cache, batches))


def load(path: str | Path, mesh: Mesh | None = None, partition_manager: Resolver | None = None) -> SavedCache:
    """Return the cache, and its allocator, that :func:`save` wrote. Pages that were not in use are fresh.

    Args:
        mesh: the devices; None for the default device.
        partition_manager: as for :meth:`PagedAttentionCache.init_cache`.

    Raises:
        FileNotFoundError: nothing was saved there whole, or a file is missing.
        RegistryError: the format is not installed.
        ValueError: a file that was changed, cut or exchanged, or written by another version of qpaged; it is
            named.
        ImportError: the extra ``files`` is not installed.
    """
    path = Path(path)
    record = read_manifest(path)
    if (record.get("qpaged"), record.get("version")) != (KIND, VERSION):
        raise ValueError(
            f"{path} must hold a {KIND} of version {VERSION}, but holds {record.get('qpaged')!r} of version "
            f"{record.get('version')!r}; read it with the qpaged that wrote it."
        )
    metadata = PagedAttentionCacheMetaData.from_dict(record["metadata"])
    formats = metadata.quantizer or CacheFormat.from_config(record["format"])
    cache = PagedAttentionCache.init_cache(mesh, record["dtype"], metadata, partition_manager, formats)
    cache = _loaded(cache, path, record)
    allocator = record["allocator"]
    return SavedCache(cache, None if allocator is None else allocator_of_record(metadata, allocator))


def _loaded(cache: PagedAttentionCache, path: Path, record: dict[str, Any]) -> PagedAttentionCache:
    """Return a fresh cache, which is donated, with what the files hold."""
    names, filled = map(list, zip(*_parts.pools_of(cache), strict=True))
    *files, last = record["files"]
    for entry, pages in zip(files, record["pages"], strict=True):
        tensors = read_file(path, entry)
        indices = np.asarray(pages, np.int32)
        for index, pool in enumerate(filled):
            filled[index] = _parts.put_page_parts(pool, indices, _parts.of_pool(names[index], tensors))
    tensors = read_file(path, last)
    beside = [
        _parts.with_parts_beside(pool, _parts.of_pool(name, tensors))
        for name, pool in zip(names, filled, strict=True)
    ]
    return _parts.with_pools(cache, beside)


def _files(cache: PagedAttentionCache, batches: list[np.ndarray]) -> Iterator[tuple[str, Tensors]]:
    """Yield the kind and the arrays of each file: pages, some at a time, and then what is beside them."""
    for pages in batches:
        yield "pages", _parts.of_all_pools(cache, lambda pool: _parts.page_parts(pool, pages))  # noqa: B023
    yield "beside", _parts.of_all_pools(cache, _parts.bits_beside)


def _format_of(cache: PagedAttentionCache) -> CacheFormat:
    """Return the formats of all pools, of a cache whose metadata does not tell them."""
    made = [
        CacheFormat(pools.format_of(view.key_pages), pools.format_of(view.value_pages))  # type: ignore[arg-type]  # a cache's are quantizers
        for view in cache.views
    ]
    return made[0].with_layers({layer: other for layer, other in enumerate(made) if other != made[0]})
