"""Quantized pools: codes and scales, which go everywhere together."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from qpaged import arrays
from qpaged.arrays import (
    QuantizedArray,
    as_slots,
    check_parts,
    fill_lane_rows,
    float_dtype,
    gather_pages,
    write_rows,
)
from qpaged.formats import quantizer_from_config
from qpaged.pools._pool import Pool, PoolBytes, SlotMapping, Slots, bytes_of
from qpaged.pools._sharding import keep_sharding


@dataclass(frozen=True)
class QuantizedPool(Pool):
    """A pool that is a :class:`QuantizedArray`."""

    pages: QuantizedArray

    def write_slots(self, mapping: SlotMapping, rows: jax.Array) -> QuantizedArray:
        return keep_sharding(write_slots, self.pages)(self.pages, mapping, rows)

    def gather_slots(self, indices: jax.Array) -> Slots:
        return as_slots(gather_pages(self.pages, indices))

    def clear_pages(self, indices: jax.Array) -> QuantizedArray:
        return keep_sharding(arrays.clear_pages, self.pages)(self.pages, indices)

    def copy_pages(self, source: jax.Array, target: jax.Array) -> QuantizedArray:
        return keep_sharding(arrays.copy_pages, self.pages)(self.pages, source, target)

    def count_bytes(self) -> PoolBytes:
        codes = bytes_of(self.pages.stored)
        return PoolBytes(codes=codes, scales=bytes_of(self.pages) - codes)

    def fill_lane_rows(self) -> QuantizedArray:
        return fill_lane_rows(self.pages)

    def as_quantized(self) -> QuantizedArray:
        return self.pages

    def to_record(self) -> dict[str, Any]:
        return {
            "type": "QuantizedArray",
            "quantizer": self.pages.quantizer.config,  # type: ignore[attr-defined]  # a cache's is a Quantizer
            "dtype": jnp.dtype(self.pages.dtype).name,
            "codes": self.pages.codes,
            "scales": self.pages.scales,
            "outer": self.pages.global_scale,  # the name that files have for it
        }


def write_slots(pages: QuantizedArray, mapping: SlotMapping, rows: jax.Array) -> QuantizedArray:
    """Return ``pages`` with ``rows`` (tokens, kv_heads, head_dim) quantized and written at (page, slot)."""
    return write_rows(pages, (1, 2), mapping, rows)


def from_record(data: Mapping[str, Any]) -> QuantizedArray:
    """Return the pages that :meth:`QuantizedPool.to_record` wrote, whose arrays have been read already.

    Raises:
        RegistryError: the format is not installed.
        ValueError: parts are missing, or do not fit each other.
    """
    try:
        quantizer = quantizer_from_config(data["quantizer"])
        dtype = float_dtype("dtype", data["dtype"])
        codes, scales = data["codes"], data["scales"]
        global_scale = data.get("outer")  # which the first files do not have
        check_parts(codes, scales, global_scale, quantizer, dtype)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"data holds pages that are not whole: {error!r}") from error
    pages = QuantizedArray(
        stored=codes, scales=scales, global_scale=global_scale, quantizer=quantizer, dtype=dtype
    )
    return fill_lane_rows(pages)
