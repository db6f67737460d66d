"""Values that lie in the pool of keys, as in multi-head latent attention: a pool that holds nothing."""

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from qpaged.arrays import float_dtype
from qpaged.pools._pool import Pool, PoolBytes, SlotMapping


@functools.partial(jax.tree_util.register_dataclass, data_fields=[], meta_fields=["shape", "dtype"])
@dataclass(frozen=True)
class ValuesInKeys(Pool):
    """What stands for a pool of values where values lie in the pool of keys.

    A pytree without leaves. Attention reads :meth:`Pool.values_within` of the keys in its place: of most
    kinds the keys themselves, whose first channels are the values.

    Attributes:
        shape: static; (kv_heads, pages, page_size, channels that are values).
        dtype: static; that of the keys.
    """

    shape: tuple[int, int, int, int]
    dtype: np.dtype

    def write_slots(self, mapping: SlotMapping, rows: jax.Array) -> "ValuesInKeys":
        return self

    def gather_slots(self, indices: jax.Array) -> jax.Array:
        raise TypeError("values that lie in the keys have no pages of their own; read those of the keys.")

    def clear_pages(self, indices: jax.Array) -> "ValuesInKeys":
        return self

    def copy_pages(self, source: jax.Array, target: jax.Array) -> "ValuesInKeys":
        return self

    def take_pages(self, indices: jax.Array, sequences: int) -> "ValuesInKeys":
        kv_heads, _, page_size, channels = self.shape
        return dataclasses.replace(self, shape=(kv_heads, len(indices), page_size, channels))

    def put_pages(self, taken: "ValuesInKeys", target: jax.Array) -> "ValuesInKeys":
        return self

    def count_bytes(self) -> PoolBytes:
        return PoolBytes(codes=0, scales=0)

    def to_record(self) -> dict[str, Any]:
        return {"type": "ValuesInKeys", "shape": list(self.shape), "dtype": self.dtype.name}


def from_record(data: Mapping[str, Any]) -> ValuesInKeys:
    """Return the pool that :meth:`ValuesInKeys.to_record` wrote.

    Raises:
        ValueError: parts are missing, or are none of such a pool.
    """
    try:
        shape, dtype = tuple(data["shape"]), float_dtype("dtype", data["dtype"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"data holds pages that are not whole: {error!r}") from error
    if len(shape) != 4 or not all(type(length) is int and length > 0 for length in shape):
        raise ValueError(f"shape must be that of a pool, but data holds {data['shape']!r}.")
    return ValuesInKeys(shape, dtype)
