"""Placing a quantized array on devices: its codes and scales are placed as the array would be."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from qpaged._compat import spec_axes
from qpaged.arrays._quantized import QuantizedArray

Place = Callable[[jax.Array, Any], jax.Array]


def place(array: QuantizedArray, where: Any, put: Place) -> QuantizedArray | None:
    """Return ``array`` with each of its children placed by ``put``; None where ``where`` is not understood.

    Args:
        where: a device, None, or a sharding of an array of this shape.
        put: a function of an array and a place, such as ``jax.device_put``.
    """
    if isinstance(where, Sharding) and not isinstance(where, NamedSharding | SingleDeviceSharding):
        return None

    def put_part(part: jax.Array) -> jax.Array:
        if isinstance(where, NamedSharding):
            return put(part, sharding_of_part(where, part.shape))
        return put(part, where)

    sharded_as_slots = array.slots_per_row == 1 or not isinstance(where, NamedSharding)
    if not sharded_as_slots and len(where.spec) == array.ndim and where.spec[-1] is not None:
        return None  # the channels of several slots share a row
    return array.with_stored(put_part(array.stored), array.parts.map(put_part))


def sharding_of_part(sharding: NamedSharding, shape: tuple[int, ...]) -> NamedSharding:
    """Return the sharding without the mesh axes that do not divide a part: scales have axes of length 1."""
    entries: list[Any] = []
    for entry, length in zip(sharding.spec, shape, strict=False):
        if entry is not PartitionSpec.UNCONSTRAINED:
            devices = int(np.prod([sharding.mesh.shape[axis] for axis in spec_axes(entry)]))
            entry = entry if length % devices == 0 else None
        entries.append(entry)
    return NamedSharding(sharding.mesh, PartitionSpec(*entries))
