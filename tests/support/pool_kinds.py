"""A kind of pool in one file: codes beside a copy in floats, which attention reads."""

from dataclasses import dataclass

import jax

import qpaged
from qpaged import pools


@dataclass(frozen=True)
class CodesWithCopy(pools.Pool):
    """int8 pages, and the same values in floats.

    Attributes:
        codes: (kv_heads, pages, page_size, head_dim), quantized.
        copy: the same in floats.
    """

    codes: qpaged.QuantizedArray
    copy: jax.Array

    @classmethod
    def of(cls, zeros):
        """Return the pages that a cache is made of, from a pool's zeros."""
        return cls(qpaged.get_quantizer("int8").empty(zeros.shape, zeros.dtype), zeros)

    @property
    def shape(self):
        return self.copy.shape

    @property
    def dtype(self):
        return self.copy.dtype

    def write_slots(self, mapping, rows):
        return CodesWithCopy(
            pools.write_slots(self.codes, mapping, rows), pools.write_slots(self.copy, mapping, rows)
        )

    def gather_slots(self, pages):
        return pools.gather_slots(self.copy, pages)

    def clear_pages(self, pages):
        return CodesWithCopy(pools.clear_pages(self.codes, pages), pools.clear_pages(self.copy, pages))

    def copy_pages(self, source, target):
        return CodesWithCopy(
            pools.copy_pages(self.codes, source, target), pools.copy_pages(self.copy, source, target)
        )

    def count_bytes(self):
        codes, copy = pools.count_bytes(self.codes), pools.count_bytes(self.copy)
        return pools.PoolBytes(codes.codes + copy.codes, codes.scales)


jax.tree_util.register_dataclass(CodesWithCopy, data_fields=["codes", "copy"], meta_fields=[])
