"""Saves a cache to a directory, and loads it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from qpaged import pools
from qpaged._arguments import check_type
from qpaged._compat import without_mesh
from qpaged._processes import Processes
from qpaged.cache import (
    PageAllocator,
    PagedAttentionCache,
    PagedAttentionCacheMetaData,
    allocator_of_record,
    allocator_to_record,
)
from qpaged.cache._placement import num_groups
from qpaged.cache._sharding import Resolver
from qpaged.formats import CacheFormat
from qpaged.storage._directory import read_manifest, write_directory
from qpaged.storage._shard_files import batches_of, files_of, read_files
from qpaged.storage._shards import Shard, shards_of

KIND, VERSION = "cache in pages", 2
FIELDS = {"allocator", "metadata", "dtype", "format", "flat", "groups", "head_parts", "batches", "files"}


class SavedCache(NamedTuple):
    """What :func:`load` returns.

    Attributes:
        cache: as it was saved.
        allocator: of its pages, as it was given: one, those of each group, or None.
    """

    cache: PagedAttentionCache
    allocator: PageAllocator | tuple[PageAllocator, ...] | None


def save(
    path: str | Path,
    cache: PagedAttentionCache,
    allocator: PageAllocator | Sequence[PageAllocator] | None = None,
) -> None:
    """Write a cache to a directory: codes, scales and exact rows, bit for bit.

    Files of some 16 MB are written two at a time, each with its digest, and the last step replaces the
    manifest that names them: whatever interrupts it, the directory holds the cache that was saved before, or
    this one.

    A cache that lies over several devices is written as each of them has it. Where these are of several
    processes, each calls this function with its cache and the same allocators, and writes what it holds, to a
    directory that all of them see.

    Args:
        path: a new directory, an empty one, or one that a cache was saved to.
        cache: all of whose layers are there.
        allocator: of its pages, or those of each group of devices, in order; only pages in use are saved
            then, and the allocators are saved, too. Sequences must be named by strings, integers, or tuples
            of these.

    Raises:
        TypeError: a cache of pages that only their class can write, or of a format that is not installed
            under its own name; or another name of a sequence.
        ValueError: layers that are missing or stacked; an allocator of another cache, or whose changes were
            not applied, or not one for each group; a directory that holds other files; or processes that do
            not all save the same.
        OSError: the files cannot be written, or are being written now, or another process failed.
        ImportError: the extra ``files`` is not installed.
    """
    check_type("cache", cache, PagedAttentionCache, "a qpaged.PagedAttentionCache", "give that of all layers")
    placement = cache.views[0].placement
    processes = Processes(None if placement is None else placement.mesh)
    record = processes.agree_on("allocator", lambda: _record_of(cache, allocator))
    with without_mesh():
        write_directory(Path(path), record, files_of(cache, record["batches"]), processes)


def _record_of(
    cache: PagedAttentionCache, allocator: PageAllocator | Sequence[PageAllocator] | None
) -> dict[str, Any]:
    """Return what a manifest says of a cache, apart from its files; or raise why it is not saved."""
    metadata, groups, shard = cache.metadata, num_groups(cache.views[0].placement), shards_of(cache)[0]
    _check_whole(cache, shard)
    pages = np.arange(metadata.num_pages_per_layer, dtype=np.int32)
    books, in_use = [], [pages] * groups
    if allocator is not None:
        books = [allocator_to_record(each) for each in _checked_allocators(cache, allocator)]
        in_use = [np.setdiff1d(pages, each["pages"]["free"]).astype(np.int32) for each in books]
    return {
        "qpaged": KIND,
        "version": VERSION,
        "allocator": books[0] if isinstance(allocator, PageAllocator) else books or None,
        "metadata": metadata.to_dict(),
        "dtype": jnp.dtype(cache.views[0].key_pages.dtype).name,
        "format": _checked_format(cache).config,
        "flat": cache.is_flat,
        "groups": groups,
        "head_parts": shard.part.total,
        "batches": batches_of(cache, shard, in_use),
    }


def load(path: str | Path, mesh: Mesh | None = None, partition_manager: Resolver | None = None) -> SavedCache:
    """Return the cache, and its allocator, that :func:`save` wrote.

    Pages that were not in use are fresh, and the numbers of layers are static.

    Args:
        mesh: the devices, which may be others than it was saved from, in as many groups; None for the default
            device. One of several processes is given in each of them.
        partition_manager: as for :meth:`PagedAttentionCache.init_cache`.

    Raises:
        FileNotFoundError: nothing was saved there whole, or a file is missing.
        RegistryError: the format is not installed.
        ValueError: a file that was changed, cut or exchanged, or written by another version of qpaged; it is
            named. Or a mesh of another number of groups.
        OSError: another process failed.
        ImportError: the extra ``files`` is not installed.
    """
    path, processes = Path(path), Processes(mesh)
    record = processes.agree_on("path", lambda: read_manifest(path))
    made: list[SavedCache] = []
    while not made:
        try:
            processes.all_do(lambda: made.append(_load(path, record, mesh, partition_manager)))  # noqa: B023
        except FileNotFoundError:
            before, record = record, read_manifest(path)
            if processes.are_many or record == before:  # else it was saved anew meanwhile
                raise
    return made[0]


def _load(
    path: Path, record: dict[str, Any], mesh: Mesh | None, partition_manager: Resolver | None
) -> SavedCache:
    """Return what a manifest describes."""
    if (record.get("qpaged"), record.get("version")) != (KIND, VERSION):
        raise ValueError(
            f"{path} must hold a {KIND} of version {VERSION}, but holds {record.get('qpaged')!r} of version "
            f"{record.get('version')!r}; read it with the qpaged that wrote it."
        )
    missing = FIELDS - record.keys()
    if missing:
        raise ValueError(
            f"{path} must have a manifest with {', '.join(sorted(missing))}, but has one without; another "
            f"version of qpaged wrote it: save the cache again."
        )
    metadata = PagedAttentionCacheMetaData.from_dict(record["metadata"])
    formats = metadata.quantizer or CacheFormat.from_config(record["format"])
    cache = PagedAttentionCache.init_cache(
        mesh, record["dtype"], metadata, partition_manager, formats, flat=record["flat"]
    )
    groups = num_groups(cache.views[0].placement)
    if groups != record["groups"]:
        raise ValueError(
            f"mesh must divide sequences into the {record['groups']} groups that were saved, but has "
            f"{groups}; page tables name pages of a group."
        )
    allocator = _loaded_allocator(metadata, record["allocator"])
    with without_mesh():
        return SavedCache(read_files(cache, path, record), allocator)


def _loaded_allocator(
    metadata: PagedAttentionCacheMetaData, books: dict[str, Any] | list[dict[str, Any]] | None
) -> PageAllocator | tuple[PageAllocator, ...] | None:
    if isinstance(books, list):
        return tuple(allocator_of_record(metadata, of_group) for of_group in books)
    return None if books is None else allocator_of_record(metadata, books)


def _checked_allocators(
    cache: PagedAttentionCache, allocator: PageAllocator | Sequence[PageAllocator]
) -> tuple[PageAllocator, ...]:
    """Return the allocators of all groups, or raise what is wrong with them."""
    allocators = tuple(allocator) if isinstance(allocator, Sequence) else (allocator,)
    groups = num_groups(cache.views[0].placement)
    for each in allocators:
        check_type(
            "allocator", each, PageAllocator, "a qpaged.PageAllocator", "or one for each group, or None"
        )
        if any(each.metadata.of_layer(layer) != view.metadata for layer, view in enumerate(cache.views)):
            raise ValueError("allocator must be that of the cache, but was made with another metadata.")
    if len(allocators) != groups:
        raise ValueError(
            f"allocator must be one for each of the {groups} groups of devices, but {len(allocators)} came; "
            f"give a list of them."
        )
    return allocators


def _check_whole(cache: PagedAttentionCache, shard: Shard) -> None:
    """Raise ValueError unless all layers are there, each as its metadata says, judged by one shard."""
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
        heads = shard.part.heads(view.metadata.num_kv_heads)
        local = view.metadata.replace(num_kv_heads=len(heads), num_pages_per_layer=len(shard.pages))
        keys, values = shard.own(view.key_pages), shard.own(view.value_pages)
        view.replace(metadata=local, key_pages=keys, value_pages=values).check_fields()


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
