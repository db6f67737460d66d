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
)
from qpaged.cache._sharding import Resolver
from qpaged.formats import CacheFormat
from qpaged.storage import _parts
from qpaged.storage._directory import Tensors, read_file, read_manifest, write_directory
from qpaged.storage._placed import check_placed

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
        TypeError: a cache of pages that only their class can write, or of a format that is not installed
            under its own name; or another name of a sequence.
        ValueError: layers that are missing or stacked; an allocator of another cache, or whose changes were
            not applied; a directory that holds other files; or pages in several groups of devices or
            processes.
        OSError: the files cannot be written, or are being written now.
        ImportError: the extra ``files`` is not installed.
    """
    check_type("cache", cache, PagedAttentionCache, "a qpaged.PagedAttentionCache", "give that of all layers")
    check_placed("cache", cache)
    _check_whole(cache)
    metadata = cache.metadata
    pages = np.arange(metadata.num_pages_per_layer, dtype=np.int32)
    record: dict[str, Any] = {"qpaged": KIND, "version": VERSION, "allocator": None}
    if allocator is not None:
        check_type("allocator", allocator, PageAllocator, "a qpaged.PageAllocator", "or None")
        if any(allocator.metadata.of_layer(layer) != view.metadata for layer, view in enumerate(cache.views)):
            raise ValueError("allocator must be that of the cache, but was made with another metadata.")
        record["allocator"] = allocator_to_record(allocator)
        pages = np.setdiff1d(pages, record["allocator"]["pages"]["free"]).astype(np.int32)
    record["metadata"] = metadata.to_dict()
    record["dtype"] = jnp.dtype(cache.views[0].key_pages.dtype).name
    record["format"] = _checked_format(cache).config
    record["flat"] = cache.is_flat
    pages_of_file = max(1, BATCH_BYTES * metadata.num_pages_per_layer // cache.nbytes)
    batches = [pages[start : start + pages_of_file] for start in range(0, len(pages), pages_of_file)]
    record["pages"] = [batch.tolist() for batch in batches]
    write_directory(Path(path), record, _files(cache, batches))


def load(path: str | Path, mesh: Mesh | None = None, partition_manager: Resolver | None = None) -> SavedCache:
    """Return the cache, and its allocator, that :func:`save` wrote.

    Pages that were not in use are fresh, and the numbers of layers are static.

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
    while True:
        try:
            return _load(path, record, mesh, partition_manager)
        except FileNotFoundError:
            before, record = record, read_manifest(path)
            if record == before:  # else it was saved anew meanwhile
                raise


def _load(
    path: Path, record: dict[str, Any], mesh: Mesh | None, partition_manager: Resolver | None
) -> SavedCache:
    """Return what a manifest describes."""
    if (record.get("qpaged"), record.get("version")) != (KIND, VERSION):
        raise ValueError(
            f"{path} must hold a {KIND} of version {VERSION}, but holds {record.get('qpaged')!r} of version "
            f"{record.get('version')!r}; read it with the qpaged that wrote it."
        )
    metadata = PagedAttentionCacheMetaData.from_dict(record["metadata"])
    formats = metadata.quantizer or CacheFormat.from_config(record["format"])
    cache = PagedAttentionCache.init_cache(
        mesh, record["dtype"], metadata, partition_manager, formats, flat=record.get("flat", False)
    )
    check_placed("mesh", cache)
    cache = _loaded(cache, path, record)
    allocator = record["allocator"]
    return SavedCache(cache, None if allocator is None else allocator_of_record(metadata, allocator))


def _loaded(cache: PagedAttentionCache, path: Path, record: dict[str, Any]) -> PagedAttentionCache:
    """Return a fresh cache, which is donated, with what the files hold."""
    names, filled = map(list, zip(*_parts.pools_of(cache), strict=True))
    batches = record["pages"]
    for entry, pages in zip(record["files"], batches, strict=False):
        tensors = read_file(path, entry)
        indices = np.asarray(pages, np.int32)
        for index, pool in enumerate(filled):
            filled[index] = _parts.put_page_parts(pool, indices, _parts.of_pool(names[index], tensors))
    beside = iter(record["files"][len(batches) :])
    for index, pool in enumerate(filled):
        if _parts.parts_beside(pool):
            tensors = read_file(path, next(beside))
            filled[index] = _parts.with_parts_beside(pool, _parts.of_pool(names[index], tensors))
    return _parts.with_pools(cache, filled)


def _files(cache: PagedAttentionCache, batches: list[np.ndarray]) -> Iterator[tuple[str, Tensors]]:
    """Yield the kind and the arrays of each file: some pages of all pools, then what each has beside them."""
    for pages in batches:
        yield "pages", _parts.of_all_pools(cache, lambda pool: _parts.page_parts(pool, pages))  # noqa: B023
    for name, pool in _parts.pools_of(cache):
        beside = _parts.bits_beside(pool)
        if beside:
            yield "beside", {f"{name}/{part}": bits for part, bits in beside.items()}


def _check_whole(cache: PagedAttentionCache) -> None:
    """Raise ValueError unless all layers are there, each as its metadata says."""
    layers = [view.layer_index for view in cache.views if view.layer_index is not None]
    if any(np.ndim(layer) for layer in layers):
        raise ValueError(
            "cache must have a view for each layer, but its layers are stacked for a scan; take them apart "
            "first: tree_map(lambda leaf: leaf[i], view)."
        )
    if cache.is_flat:
        return
    views = [view.replace(layer_index=int(layer)) for view, layer in zip(cache.views, layers, strict=True)]
    cache.replace(views=views).check_fields()
    for view in views:
        view.check_fields()


def _checked_format(cache: PagedAttentionCache) -> CacheFormat:
    """Return the formats of all pools, or raise unless they can be found again by their configuration."""
    made = [
        CacheFormat(pools.format_of(view.key_pages), pools.format_of(view.value_pages))  # type: ignore[arg-type]  # a cache's are quantizers
        for view in cache.views
    ]
    formats = made[0].with_layers({layer: other for layer, other in enumerate(made) if other != made[0]})
    found = CacheFormat.from_config(formats.config)
    if found != formats:
        raise TypeError(
            f"cache must have formats that are installed, but {formats} is another one than the {found} that "
            f"its configuration names; register it under a name of its own."
        )
    return formats
