"""The named shapes at which attention is measured and tested."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Shape:
    """One layer's attention: the newest token of several sequences, or the last chunk of one prompt.

    Attributes:
        name: its name in results and tests.
        lengths: tokens of each sequence, the newest included.
        q_heads: query heads.
        kv_heads: heads of keys and values.
        head_dim: channels of a head.
        page_size: slots of a page.
        chunk: how many of the last tokens attend; more than one needs a single sequence.
    """

    name: str
    lengths: tuple[int, ...]
    q_heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    page_size: int = 16
    chunk: int = 1

    @property
    def tokens(self) -> int:
        """The number of tokens that attend."""
        return len(self.lengths) * self.chunk

    @property
    def pages_per_sequence(self) -> int:
        """The pages of the longest sequence."""
        return -(-max(self.lengths) // self.page_size)

    @property
    def elements(self) -> int:
        """The elements of the live keys and values, which attention must read."""
        return 2 * sum(self.lengths) * self.kv_heads * self.head_dim

    def tables(self, seed: int = 0) -> tuple[np.ndarray, int]:
        """Return page tables [sequences, pages] over a shuffled pool, and the number of its pages.

        Entries past a sequence's length are that number, which is "no page".
        """
        counts = [-(-length // self.page_size) for length in self.lengths]
        pages = sum(counts)
        order = np.random.default_rng(seed).permutation(pages).astype(np.int32)
        tables = np.full((len(counts), self.pages_per_sequence), pages, np.int32)
        for row, (count, end) in enumerate(zip(counts, np.cumsum(counts), strict=True)):
            tables[row, :count] = order[end - count : end]
        return tables, pages


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("8x4k", (4096,) * 8),
        Shape("8x4k ragged", (4096, *(256,) * 7)),
        Shape("8x1k", (1024,) * 8),
        Shape("1x32k", (32_768,)),
        Shape("8x4k 64 dims", (4096,) * 8, head_dim=64),
        Shape("8x4k pages of 64", (4096,) * 8, page_size=64),
        Shape("8x4k 8 heads", (4096,) * 8, q_heads=8),
        Shape("8x4k 64 heads", (4096,) * 8, q_heads=64),
        Shape("512 of 4k", (4096,), chunk=512),
        Shape("64x1k", (1024,) * 64),
        Shape("64x8k", (8192,) * 64),
        Shape("256x1k", (1024,) * 256),
        Shape("1x128k", (131_072,)),
    )
}
"""Shapes that a CPU can hold come first; the last four are for accelerators."""
