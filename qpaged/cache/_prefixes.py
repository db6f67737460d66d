"""Full pages that are found by the tokens in them and before them."""

import hashlib
import json
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from qpaged._arguments import shown
from qpaged.cache._config import PagedAttentionCacheMetaData
from qpaged.formats import CacheFormat

HASH_BYTES = 32
DECIDING = (
    "num_hidden_layers",
    "page_size",
    "num_kv_heads",
    "kv_head_dim_size",
    "value_dim",
    "values_in_keys",
    "dtype",
)
"""What of a cache's metadata decides what is in a page, beside the format."""


def as_tokens(tokens: ArrayLike) -> np.ndarray:
    """Return tokens (n,) as int64, or raise TypeError or ValueError if they are none."""
    array = np.asarray(tokens)
    if array.ndim == 1 and not array.size:
        return np.zeros(0, np.int64)
    is_integer = array.dtype.kind in "iu" and (array.dtype != np.uint64 or array.max() < 2**63)
    if not is_integer:
        raise TypeError(
            f"tokens must be integers below 2**63, but got {shown(tokens)}; give the numbers that a "
            f"tokenizer gives, and for an image numbers that tell it from others."
        )
    if array.ndim != 1:
        raise ValueError(f"tokens must have shape (n,), but came with shape {array.shape}.")
    return array.astype(np.int64)


def root_hash(metadata: PagedAttentionCacheMetaData, *salts: str) -> bytes:
    """Return the hash before the first page's: of all but tokens that decides what is in a page."""
    pages = metadata.quantizer
    config = pages.config if isinstance(pages, CacheFormat) else getattr(pages, "__qualname__", repr(pages))
    deciding: list[Any] = [getattr(metadata, name) for name in DECIDING]
    if metadata.layer_sizes:  # which may be told beside those of any layer
        layers = [metadata.of_layer(layer) for layer in range(metadata.num_hidden_layers)]
        deciding = [[getattr(layer, name) for name in DECIDING] for layer in layers]
    text = json.dumps([deciding, config, salts], sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=HASH_BYTES).digest()


def page_hashes(parent: bytes, tokens: np.ndarray, page_size: int) -> Iterator[bytes]:
    """Yield the hash of each full page of tokens (n,), the first of which comes after ``parent``."""
    for start in range(0, len(tokens) - page_size + 1, page_size):
        page = tokens[start : start + page_size].astype("<i8").tobytes()
        parent = hashlib.blake2b(parent + page, digest_size=HASH_BYTES).digest()
        yield parent


class Prefixes:
    """Knows pages by their hashes. Those that no sequence holds are parked, until they are evicted."""

    def __init__(self) -> None:
        self._pages: dict[bytes, int] = {}
        self._hashes: dict[int, bytes] = {}
        self._parked: OrderedDict[int, None] = OrderedDict()  # the one that was parked first comes first

    @property
    def num_parked(self) -> int:
        return len(self._parked)

    def find(self, page_hash: bytes) -> int | None:
        """Return the page with these tokens, or None if there is none."""
        return self._pages.get(page_hash)

    def add(self, page_hash: bytes, page: int) -> bool:
        """Let a page be found; return False if there is another one with these tokens."""
        if page_hash in self._pages or page in self._hashes:
            return False
        self._pages[page_hash] = page
        self._hashes[page] = page_hash
        return True

    def forget(self, page: int) -> bytes | None:
        """Let a page no longer be found; return its hash if it was."""
        page_hash = self._hashes.pop(page, None)
        if page_hash is not None:
            del self._pages[page_hash]
        return page_hash

    def park(self, page: int) -> bool:
        """Keep a page that no sequence holds any more; return False if it cannot be found."""
        if page not in self._hashes:
            return False
        self._parked[page] = None
        return True

    def hold(self, page: int) -> None:
        """Note that a sequence holds a page, which may be parked."""
        self._parked.pop(page, None)

    def to_record(self) -> dict[str, Any]:
        """Return all pages that are found, and those that are parked in order, as plain JSON."""
        found = {page_hash.hex(): page for page_hash, page in self._pages.items()}
        return {"found": found, "parked": list(self._parked)}

    def restore(self, record: Mapping[str, Any]) -> None:
        """Take over what :meth:`to_record` returned."""
        self._pages = {bytes.fromhex(page_hash): page for page_hash, page in record["found"].items()}
        self._hashes = {page: page_hash for page_hash, page in self._pages.items()}
        self._parked = OrderedDict.fromkeys(record["parked"])

    def evict(self) -> tuple[bytes, int]:
        """Forget the page that was parked first; return its hash and the page."""
        page, _ = self._parked.popitem(last=False)
        page_hash = self.forget(page)
        assert page_hash is not None  # only pages that are found are parked
        return page_hash, page
