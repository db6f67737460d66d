"""Pages of prompts on a disk, found by the hashes of their tokens."""

import contextlib
import functools
import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from qpaged._arguments import check_type, positive
from qpaged._extras import need
from qpaged._files import write_whole
from qpaged.cache import PagedAttentionCache
from qpaged.storage import _parts
from qpaged.storage._directory import Tensors

KIND, VERSION = "page of a prefix", "1"
SUFFIX = ".safetensors"
KEPT = 0.9  # of the bytes that a store may hold, when it is trimmed


class PrefixStore:
    """Keeps full pages on a disk, each in a file named by its hash: for later runs, and for other processes.

    What is damaged, of another format or gone is not found; it is never an error, nor a wrong token. Hashes
    are those of :meth:`PageAllocator.prefix_hashes` and :meth:`PageAllocator.share_prefix`; give an allocator
    a ``salt`` that names the model, since hashes know only its tokens.

    Several threads and processes may use one directory.

    Args:
        path: a directory; it is made if it is not there.
        max_bytes: of all files; the ones used last are kept. None for no limit.

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
        self._bytes = sum(file.stat().st_size for file in self._files())

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
            OSError: a file cannot be written.
        """
        check_type("cache", cache, PagedAttentionCache, "a qpaged.PagedAttentionCache", "give the whole one")
        missing = [page_hash for page_hash in pages if page_hash not in self]
        if not missing:
            return
        size = 1 << (len(missing) - 1).bit_length()
        indices = np.full(size, cache.views[0].metadata.num_pages_per_layer, np.int32)
        indices[: len(missing)] = [pages[page_hash] for page_hash in missing]
        taken = _take_packed(cache, indices)
        order = np.arange(size, dtype=np.int32)
        parts = _parts.of_all_pools(taken, lambda pool: _parts.page_parts(pool, order))
        for index, page_hash in enumerate(missing):
            page = {name: np.ascontiguousarray(bits[:, index : index + 1]) for name, bits in parts.items()}
            self._write(page_hash, page)

    def get(
        self, cache: PagedAttentionCache, hashes: Sequence[bytes], pages: ArrayLike
    ) -> tuple[PagedAttentionCache, int]:
        """Return the cache, which is donated, with the first of these pages as far as they are found.

        Args:
            hashes: of pages that follow each other in a prompt.
            pages: (len(hashes),) integers: where each of them goes.

        Returns:
            the cache, and how many pages it was given: up to the first that is not found.
        """
        indices = np.asarray(pages)
        if indices.shape != (len(hashes),):
            raise ValueError(
                f"pages must have shape ({len(hashes)},), one for each hash, but came with {indices.shape}."
            )
        expected = _parts.of_all_pools(cache, _parts.kinds_of_page_parts)
        found: list[Tensors] = []
        for page_hash in hashes:
            page = self._read(page_hash, expected)
            if page is None:
                break
            found.append(page)
        if not found:
            return cache, 0
        size = 1 << (len(found) - 1).bit_length()
        target = np.full(size, cache.views[0].metadata.num_pages_per_layer, np.int32)
        target[: len(found)] = indices[: len(found)]
        rows = found + [found[-1]] * (size - len(found))
        parts = {name: np.concatenate([page[name] for page in rows], axis=1) for name in expected}
        cache = _reset(cache, target)
        filled = []
        for name, pool in _parts.pools_of(cache):
            filled.append(_parts.put_page_parts(pool, target, _parts.of_pool(name, parts)))
        return _parts.with_pools(cache, filled), len(found)

    def _file(self, page_hash: bytes) -> Path:
        name = page_hash.hex()
        return self.path / name[:2] / f"{name}{SUFFIX}"

    def _files(self) -> list[Path]:
        return list(self.path.glob(f"??/*{SUFFIX}"))

    def _write(self, page_hash: bytes, page: Tensors) -> None:
        data = need("safetensors.numpy", "files").save(page, _note(page_hash, page))
        file = self._file(page_hash)
        file.parent.mkdir(exist_ok=True)
        write_whole(file, data)
        with self._lock:
            self._bytes += len(data)
            if self.max_bytes is not None and self._bytes > self.max_bytes:
                self._trim(self.max_bytes * KEPT)

    def _read(self, page_hash: bytes, expected: Mapping[str, _parts.Kind]) -> Tensors | None:
        """Return the page of a hash; None if there is none, or it is damaged and so removed."""
        safetensors = need("safetensors", "files")
        file = self._file(page_hash)
        try:
            with safetensors.safe_open(file, "np") as opened:
                note = opened.metadata()
                page = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  # no mapping
            kind = {name: (bits.shape, bits.dtype) for name, bits in page.items()}
            is_sound = note == _note(page_hash, page) and kind == expected
        except FileNotFoundError:
            return None
        except (safetensors.SafetensorError, OSError, ValueError, TypeError):
            is_sound = False
        with contextlib.suppress(OSError):  # of a directory that is read only
            if is_sound:
                os.utime(file)
            else:
                file.unlink()
        return page if is_sound else None

    def _trim(self, most: float) -> None:
        """Remove the files that were used first, until the others have at most so many bytes."""
        states = [(file.stat(), file) for file in self._files()]
        self._bytes = sum(state.st_size for state, _ in states)
        for state, file in sorted(states, key=lambda pair: pair[0].st_mtime_ns):
            if self._bytes <= most:
                return
            file.unlink(missing_ok=True)
            self._bytes -= state.st_size


def _note(page_hash: bytes, page: Tensors) -> dict[str, str]:
    """Return what is noted of a page: a digest of its arrays, with all that says what they are."""
    digest = need("xxhash", "files").xxh3_128(f"{KIND} {VERSION} {page_hash.hex()}".encode())
    for name in sorted(page):
        bits = page[name]
        digest.update(f"{name} {bits.dtype.name} {bits.shape}".encode())
        digest.update(np.ascontiguousarray(bits).data)
    return {"qpaged": KIND, "version": VERSION, "digest": digest.hexdigest()}


@jax.jit
def _take_packed(cache: PagedAttentionCache, pages: jax.Array) -> PagedAttentionCache:
    """Return a cache of these pages, all of which are packed."""
    taken = cache.take_pages(pages)
    page_size = cache.views[0].metadata.page_size
    return taken.pack_pages(jnp.arange(len(pages)), jnp.full(len(pages), page_size))


@functools.partial(jax.jit, donate_argnums=0)
def _reset(cache: PagedAttentionCache, pages: jax.Array) -> PagedAttentionCache:
    return cache.reset_pages(pages)
