"""Quantized pools: codes and scales, which go everywhere together."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from qpaged.arrays import (
    ArrayFormat,
    QuantizedArray,
    check_parts,
    fill_lane_rows,
    float_dtype,
)
from qpaged.formats import quantizer_from_config
from qpaged.pools._array import ArrayPool
from qpaged.pools._pool import PoolBytes, bytes_of, no_record_of


@dataclass(frozen=True)
class QuantizedPool(ArrayPool):
    """A pool that is a :class:`QuantizedArray`."""

    pages: QuantizedArray

    @property
    def format(self) -> ArrayFormat:
        return self.pages.quantizer

    @property
    def static_scales(self) -> jax.Array | None:
        return self.pages.scales if self.pages.quantizer.has_static_scales else None

    def with_static_scales(self, scales: jax.Array) -> QuantizedArray:
        return self.pages.with_stored(self.pages.stored, self.pages.parts._replace(scales=scales))

    def count_bytes(self) -> PoolBytes:
        codes = bytes_of(self.pages.stored)
        return PoolBytes(codes=codes, scales=bytes_of(self.pages) - codes)

    def fill_lane_rows(self) -> QuantizedArray:
        return fill_lane_rows(self.pages)

    def as_quantized(self) -> QuantizedArray:
        return self.pages

    def to_record(self) -> dict[str, Any]:
        if not self.pages.quantizer.writable:
            raise no_record_of(self.pages)
        return {
            "type": "QuantizedArray",
            "quantizer": self.pages.quantizer.config,  # type: ignore[attr-defined]  # a cache's is a Quantizer
            "dtype": jnp.dtype(self.pages.dtype).name,
            "codes": self.pages.codes,
            "scales": self.pages.scales,
            "outer": self.pages.global_scale,  # the name that files have for it
        }


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
    if scales is not None and _reads_nan(pages):
        raise ValueError(
            f"codes and scales must read as numbers, but some of these read as NaN, which {quantizer} never "
            f"writes; the data was not written whole."
        )
    return fill_lane_rows(pages)


@jax.jit
def _reads_nan(pages: QuantizedArray) -> jax.Array:
    # Scales and codes apart, and no transform of theirs: a pool of floats need not be there.
    return jnp.isnan(pages.multipliers()).any() | jnp.isnan(pages.values(jnp.float32)).any()
