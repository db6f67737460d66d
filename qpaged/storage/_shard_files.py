"""The files of a cache: pages in batches, one for each part of the KV heads, and what pools have beside."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeAlias, TypedDict

import numpy as np

from qpaged.cache import PagedAttentionCache
from qpaged.storage import _parts
from qpaged.storage._directory import Tags, Tensors, read_file
from qpaged.storage._parts import Kind, NamedPool
from qpaged.storage._shards import Part, Shard, join_shards, shards_of

Key: TypeAlias = tuple[str | int, ...]

BATCH_BYTES = 2**24  # of a file of pages; a few are in memory beside the cache


class Batch(TypedDict):
    """Pages that are together in files, as the manifest has them.

    Attributes:
        group: the group of devices, from 0.
        pages: in numbers of the group.
    """

    group: int
    pages: list[int]


def batches_of(cache: PagedAttentionCache, shard: Shard, in_use: Sequence[np.ndarray]) -> list[Batch]:
    """Return the pages in use, those of each device by themselves.

    Args:
        cache: all of it.
        shard: any part of it.
        in_use: of each group, [n] int32, ascending.
    """
    local = len(shard.pages)
    contexts = cache.views[0].metadata.num_pages_per_layer // local
    shard_bytes = cache.nbytes // (len(in_use) * contexts * shard.part.total)
    most = max(1, BATCH_BYTES * local // shard_bytes)
    batches = []
    for group, pages in enumerate(in_use):
        for first in range(0, contexts * local, local):
            own = pages[(pages >= first) & (pages < first + local)]
            for start in range(0, len(own), most):
                batches.append(Batch(group=group, pages=own[start : start + most].tolist()))
    return batches


def files_of(cache: PagedAttentionCache, batches: Sequence[Batch]) -> Iterator[tuple[Tags, Tensors]]:
    """Yield what each file of this process is of, and its arrays: what a device holds and none before it."""
    for shard in shards_of(cache):
        if shard.is_copy:
            continue
        own = [
            (name, shard.own(pool))
            for name, pool, kv_heads in _parts.pools_of(cache)
            if shard.part.is_first(kv_heads)
        ]
        for number, batch in enumerate(batches):
            pages = shard.own_pages(np.asarray(batch["pages"]))
            if batch["group"] == shard.group and own and (pages < len(shard.pages)).all():
                tensors = {}
                for name, pool in own:
                    tensors.update(_parts.named(name, _parts.page_parts(pool, pages)))
                yield {"kind": "pages", "batch": number, "part": shard.part.number}, tensors
        if shard.pages.start:
            continue  # those that share pages have nothing of their own beside them
        for name, pool in own:
            tensors = _parts.named(name, _parts.bits_beside(pool))
            if tensors:
                part = shard.part.number
                yield {"kind": "beside", "pool": name, "group": shard.group, "part": part}, tensors


def read_files(cache: PagedAttentionCache, path: Path, record: Mapping[str, Any]) -> PagedAttentionCache:
    """Return a fresh cache, which is donated, with what the files of a manifest hold."""
    with _Files(path, record) as files:
        return _with_files(cache, files, record["batches"])


def _with_files(cache: PagedAttentionCache, files: "_Files", batches: Sequence[Batch]) -> PagedAttentionCache:
    """Return a cache with the pages of all batches, and with what pools have beside them."""
    shards, pools = shards_of(cache), list(_parts.pools_of(cache))
    own_pools = [[shard.own(pool) for _, pool, _ in pools] for shard in shards]
    for number, batch in enumerate(batches):
        pages = np.asarray(batch["pages"])
        read = functools.cache(files.pages_of(number))  # once for all devices
        for shard, own in zip(shards, own_pools, strict=True):
            indices = shard.own_pages(pages)
            if batch["group"] == shard.group and (indices < len(shard.pages)).any():
                for index, pool in enumerate(pools):
                    kinds = functools.partial(_parts.kinds_of_page_parts, own[index])
                    parts = files.parts_of(pool, shard, read, kinds)
                    own[index] = _parts.put_page_parts(own[index], indices, parts)
    for shard, own in zip(shards, own_pools, strict=True):
        for index, pool in enumerate(pools):
            if _parts.parts_beside(own[index]):
                kinds = functools.partial(_parts.kinds_beside, own[index])
                parts = files.parts_of(pool, shard, files.beside_of(pool.name, shard.group), kinds)
                own[index] = _parts.with_parts_beside(own[index], parts)
    held = zip(*own_pools, strict=True)
    joined = [join_shards(pool, shards, own) for (_, pool, _), own in zip(pools, held, strict=True)]
    return _parts.with_pools(cache, joined)


class _Files(contextlib.ExitStack):
    """The files that a manifest names, read by a thread of its own until it is closed."""

    def __init__(self, path: Path, record: Mapping[str, Any]):
        super().__init__()
        self._path = path
        self._disk = self.enter_context(ThreadPoolExecutor(1))
        self._pages: dict[Key, Future[Tensors]] = {}
        self._parts = [Part(number, record["head_parts"]) for number in range(record["head_parts"])]
        self._entries: dict[Key, Mapping[str, Any]] = {}
        for entry in record["files"]:
            names = ("batch", "part") if entry["kind"] == "pages" else ("pool", "group", "part")
            self._entries[(entry["kind"], *(entry[name] for name in names))] = entry

    def pages_of(self, batch: int) -> Callable[[int], Tensors]:
        """Return a function that gives the pages of a batch that are of a part of the heads.

        Whoever wants them will want those of the next batch, which are read meanwhile.
        """

        def read(part: int) -> Tensors:
            own, following = ("pages", batch, part), ("pages", batch + 1, part)
            for key in own, following:
                if key in self._entries and key not in self._pages:
                    self._pages[key] = self._disk.submit(read_file, self._path, self._entries[key])
            return self._pages.pop(own).result()

        return read

    def beside_of(self, pool: str, group: int) -> Callable[[int], Tensors]:
        """Return a function that reads what a pool has beside its pages, of a part of the heads."""
        return lambda part: read_file(self._path, self._entries["beside", pool, group, part])

    def parts_of(
        self,
        pool: NamedPool,
        shard: Shard,
        read: Callable[[int], Tensors],
        kinds: Callable[[], Mapping[str, Kind]],
    ) -> Tensors:
        """Return the arrays of a pool that a shard holds, from the files of those who held its heads.

        Args:
            pool: the pool.
            shard: the shard.
            read: gives the arrays of a part of the heads, of all pools.
            kinds: gives shape and dtype of the shard's own arrays.
        """
        wanted = shard.part.heads(pool.kv_heads)
        held = {}
        for part in self._parts:
            heads = part.heads(pool.kv_heads)
            if part.is_first(pool.kv_heads) and heads.start < wanted.stop and wanted.start < heads.stop:
                held[heads] = _parts.of_pool(pool.name, read(part.number))
        return held[wanted] if wanted in held else _parts.of_heads(held, wanted, kinds())
