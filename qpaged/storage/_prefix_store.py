"""Pages of prompts on a disk, found by the hashes of their tokens."""

import contextlib
import json
import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from qpaged import pools
from qpaged._arguments import check_type, positive, shown, whole_number
from qpaged._extras import need
from qpaged._files import write_whole
from qpaged.cache import PagedAttentionCache, PagedAttentionCacheView
from qpaged.cache._page_changes import filled_up
from qpaged.storage import _parts
from qpaged.storage._directory import Tensors, file_digest

KIND, VERSION = "page of a prefix", "1"
PAGES_AT_ONCE = 64  # which are in memory beside the cache
KEPT = 0.9  # of the bytes that a store may hold, when it is trimmed


class PrefixStore:
    """Keeps full pages on a disk, each in a file named by its hash: for later runs, and for other processes.

    What is damaged, of another format or gone is not found; it is never an error, nor a wrong token. Hashes
    are those of :meth:`PageAllocator.prefix_hashes` and :meth:`PageAllocator.share_prefix`; give an allocator
    a ``salt`` that names the model, since hashes know only its tokens.

    Several threads and processes may use one directory.

    Args:
        path: a directory; it is made if it is not there.
        max_bytes: of all files, as far as this process knows of them: what it found, and what it writes. The
            ones used last are kept. None for no limit.

    Raises:
        ImportError: the extra ``files`` is not installed.
    """

    def __init__(self, path: str | Path, max_bytes: int | None = None):
        for module in ("safetensors.numpy", "xxhash"):
            need(module, "files")
        self.path = Path(path)
        self.max_bytes = None if max_bytes is None else positive("max_bytes", max_bytes)
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        self._bytes = sum(state.st_size for state, _ in self._states())

    def __contains__(self, page_hash: bytes) -> bool:
        return self._file(page_hash).exists()

    def count(self, hashes: Sequence[bytes]) -> int:
        """Return how many of the first hashes have a file, up to the first that has none."""
        return next((index for index, page_hash in enumerate(hashes) if page_hash not in self), len(hashes))

    def put(self, cache: PagedAttentionCache, pages: Mapping[bytes, int]) -> None:
        """Write full pages of a cache, exact ones as they will be once they are packed.

        Args:
            pages: the page of each hash, as :meth:`PageAllocator.share_prefix` returns them, or those that
                :attr:`PageChanges.evicted` lists, before the changes are applied.

        Raises:
            ValueError: a page that the cache does not have, or a flat cache.
            OSError: a file cannot be written.
        """
        check_type("cache", cache, PagedAttentionCache, "a qpaged.PagedAttentionCache", "give the whole one")
        num_pages = cache.views[0].metadata.num_pages_per_layer
        numbers = {page_hash: whole_number("pages", page) for page_hash, page in pages.items()}
        wrong = [page for page in numbers.values() if not 0 <= page < num_pages]
        if wrong:
            raise ValueError(
                f"pages must be those of the cache, from 0 to {num_pages - 1}, but {wrong[0]} came; leave "
                f"out hashes without a page."
            )
        missing = [page_hash for page_hash in numbers if page_hash not in self]
        kind = _kind_of(cache)
        for start in range(0, len(missing), PAGES_AT_ONCE):
            hashes = missing[start : start + PAGES_AT_ONCE]
            indices = filled_up([numbers[page_hash] for page_hash in hashes], num_pages)
            order = np.arange(len(indices), dtype=np.int32)
            # By views without their numbers: layers that are alike share a compilation.
            views = [_take_packed(view.replace(layer_index=0), indices) for view in cache.views]
            taken = cache.replace(views=views)
            parts = _parts.of_all_pools(taken, lambda pool: _parts.page_parts(pool, order))  # noqa: B023
            for index, page_hash in enumerate(hashes):
                page = {name: bits[:, index : index + 1].copy() for name, bits in parts.items()}
                self._write(page_hash, page, kind)

    def get(
        self, cache: PagedAttentionCache, hashes: Sequence[bytes], pages: ArrayLike
    ) -> tuple[PagedAttentionCache, int]:
        """Return the cache, which is donated, with the first of these pages as far as they are found.

        Args:
            hashes: of pages that follow each other in a prompt.
            pages: (len(hashes),) integers: where each of them goes.

        Returns:
            the cache, and how many pages it was given: up to the first that is not found, or that is no page.

        Raises:
            TypeError, ValueError: pages that are no integers, or not as many as hashes.
        """
        indices = np.asarray(pages)
        if indices.shape != (len(hashes),):
            raise ValueError(
                f"pages must have shape ({len(hashes)},), one for each hash, but came with {indices.shape}."
            )
        if len(hashes) and indices.dtype.kind not in "iu":
            raise TypeError(f"pages must be integers, but got {shown(pages)}; give those of a page table.")
        is_page = (indices >= 0) & (indices < cache.views[0].metadata.num_pages_per_layer)
        most = int(np.append(is_page, False).argmin())
        kind, count = _kind_of(cache), 0
        while count < most:
            asked = min(count + PAGES_AT_ONCE, most)
            found = self._read_all(hashes[count:asked], kind)
            if found:
                cache = _put(cache, found, indices[count : count + len(found)])
                count += len(found)
            if count < asked:
                break
        return cache, count

    def _file(self, page_hash: bytes) -> Path:
        name = page_hash.hex()
        return self.path / name[:2] / f"{name}.safetensors"

    def _states(self) -> list[tuple[os.stat_result, Path]]:
        """Return all files, those that a writer left behind too, but for what others remove meanwhile."""
        states = []
        for file in self.path.glob("??/*"):
            with contextlib.suppress(FileNotFoundError):
                states.append((file.stat(), file))
        return states

    def _write(self, page_hash: bytes, page: Tensors, kind: str) -> None:
        data = need("safetensors.numpy", "files").save(page, _note(page_hash, page, kind))
        file = self._file(page_hash)
        file.parent.mkdir(exist_ok=True)
        write_whole(file, data)
        with self._lock:
            self._bytes += len(data)
            if self.max_bytes is not None and self._bytes > self.max_bytes:
                self._trim(self.max_bytes * KEPT)

    def _read_all(self, hashes: Sequence[bytes], kind: str) -> list[Tensors]:
        """Return the pages of hashes, up to the first that is not found."""
        found: list[Tensors] = []
        for page_hash in hashes:
            page = self._read(page_hash, kind)
            if page is None:
                break
            found.append(page)
        return found

    def _read(self, page_hash: bytes, kind: str) -> Tensors | None:
        """Return the page of a hash; None if there is none of this kind. What is damaged is removed."""
        safetensors = need("safetensors", "files")
        file = self._file(page_hash)
        try:
            with safetensors.safe_open(file, "np") as opened:
                note = opened.metadata()
                page = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  # no mapping
            is_sound = note == _note(page_hash, page, note["kind"])
        except FileNotFoundError:
            return None
        except (safetensors.SafetensorError, OSError, ValueError, TypeError, KeyError, AttributeError):
            is_sound = False
        with contextlib.suppress(OSError):  # of a directory that is read only
            if is_sound:
                os.utime(file)
            else:
                file.unlink()
        return page if is_sound and note["kind"] == kind else None

    def _trim(self, most: float) -> None:
        """Remove the files that were used first, until the others have at most so many bytes."""
        states = self._states()
        self._bytes = sum(state.st_size for state, _ in states)
        for state, file in sorted(states, key=lambda pair: pair[0].st_mtime_ns):
            if self._bytes <= most:
                return
            file.unlink(missing_ok=True)
            self._bytes -= state.st_size


def _kind_of(cache: PagedAttentionCache) -> str:
    """Return what the pages of a cache must have in common with those of another: formats, sizes, scales.

    Raises:
        ValueError: the cache is flat, or its pages lie in several groups of devices.
    """
    _check_placed(cache)
    if cache.is_flat:
        raise ValueError(
            "cache must have a pool for each layer, whose pages are in files of their own, but its layers "
            "lie in one pool; make it with init_cache(..., flat=False)."
        )
    pools_alike = []
    for name, pool, _ in _parts.pools_of(cache):
        made_with, scales = pools.packed_format(pool), pools.static_scales(pool)
        parts = {part: (shape, bits.name) for part, (shape, bits) in _parts.kinds_of_page_parts(pool).items()}
        config = None if made_with is None else made_with.config  # type: ignore[attr-defined]  # a cache's is a Quantizer
        given = None if scales is None else np.asarray(scales).tobytes().hex()
        pools_alike.append([name, config, jnp.dtype(pool.dtype).name, parts, given])
    return file_digest(json.dumps(pools_alike, sort_keys=True).encode())


def _check_placed(cache: PagedAttentionCache) -> None:
    """Raise ValueError for pages that lie in several groups or processes, or are stored several times."""
    view = cache.views[0]
    placement, stored_heads = view.placement, view.key_pages.shape[0]
    is_divided = placement is not None and bool(placement.groups or placement.context)
    leaves = jax.tree_util.tree_leaves(view)
    is_here = all(getattr(leaf, "is_fully_addressable", True) for leaf in leaves)
    if is_divided or not is_here or stored_heads != view.metadata.num_kv_heads:
        raise ValueError(
            "cache must have all its pages in one group and in this process, and each KV head once, to be in "
            "a store; divide KV heads alone, over as many devices as there are heads at most."
        )


def _put(cache: PagedAttentionCache, found: list[Tensors], pages: np.ndarray) -> PagedAttentionCache:
    """Return a cache, which is donated, with some pages put."""
    target = filled_up(pages.tolist(), cache.views[0].metadata.num_pages_per_layer)
    rows = found + [found[-1]] * (len(target) - len(found))
    parts = {name: np.concatenate([page[name] for page in rows], axis=1) for name in found[0]}
    filled = []
    for name, pool, _ in _parts.pools_of(cache):
        # Cleared first: a page that is exact would be read as it was.
        filled.append(_parts.put_page_parts(_clear(pool, target), target, _parts.of_pool(name, parts)))
    return _parts.with_pools(cache, filled)


def _note(page_hash: bytes, page: Tensors, kind: str) -> dict[str, str]:
    """Return what is noted of a page: its kind, and a digest of its arrays and of all that tells them."""
    digest = need("xxhash", "files").xxh3_128(f"{KIND} {VERSION} {kind} {page_hash.hex()}".encode())
    for name in sorted(page):
        bits = page[name]
        digest.update(f"{name} {bits.dtype.name} {bits.shape}".encode())
        digest.update(np.ascontiguousarray(bits).data)
    return {"qpaged": KIND, "version": VERSION, "kind": kind, "digest": digest.hexdigest()}


@jax.jit
def _take_packed(view: PagedAttentionCacheView, pages: jax.Array) -> PagedAttentionCacheView:
    """Return a view of these pages, all of which are packed."""
    lengths = jnp.full(len(pages), view.metadata.page_size)
    return view.take_pages(pages).pack_pages(jnp.arange(len(pages)), lengths)


_clear = jax.jit(pools.clear_pages, donate_argnums=0)
