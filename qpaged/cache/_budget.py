"""How many pages fit into a device's memory."""

import os
import warnings
from fractions import Fraction
from typing import NamedTuple

import jax
from jax.sharding import Mesh
from jax.typing import DTypeLike

from qpaged.cache._fresh import PoolFormat, Sequences, device_bytes
from qpaged.cache._sharding import Resolver


class HostMemoryWarning(UserWarning):
    """A device that does not tell its memory was given a share of the host's."""


def available_bytes(
    mesh: Mesh | None, device: jax.Device, utilization: float, memory_bytes: int | None
) -> int:
    """Return the bytes that the cache may take on each device.

    That is ``utilization`` of ``memory_bytes``, or of what the devices report, less what is in use there
    already; the least over the mesh. Devices that report nothing share what is free on the host.

    Raises:
        ValueError: ``memory_bytes`` is not given, and the mesh has devices of several processes.
    """
    if memory_bytes is not None:
        return int(memory_bytes * utilization)
    devices = [device] if mesh is None else list(mesh.devices.flat)
    if len({device.process_index for device in devices}) > 1:
        # Devices tell their memory to their own process alone. Asking the others would hang if one did not.
        raise ValueError(
            "memory_bytes must be given for a mesh of several processes: each would plan by its own devices' "
            "free memory, and make a cache of another size; pass the same number in all of them."
        )
    stats = [device.memory_stats() or {} for device in devices]
    limits = [int(stat.get("bytes_reservable_limit", stat.get("bytes_limit", 0))) for stat in stats]
    if stats and all(limits):
        used = [stat.get("bytes_in_use", 0) for stat in stats]
        return min(int(limit * utilization) - in_use for limit, in_use in zip(limits, used, strict=True))
    share = _free_host_bytes() // max(1, len(stats))
    warnings.warn(
        f"{devices[0].device_kind} devices do not report their memory; the cache takes {utilization:.0%} of "
        f"{share:,} bytes, each device's share of the host's free memory. Pass memory_bytes= to say "
        f"otherwise.",
        HostMemoryWarning,
        stacklevel=3,
    )
    return int(share * utilization)


def default_device() -> jax.Device:
    """Return the device on which arrays are made where none is named."""
    device = getattr(jax.config, "jax_default_device", None) or jax.devices()[0]
    if isinstance(device, str):  # a platform
        return jax.local_devices(backend=device)[0]
    return device


def _free_host_bytes() -> int:
    """Return the host's free memory, or all of it where the free part is not told."""
    for pages in ("SC_AVPHYS_PAGES", "SC_PHYS_PAGES"):
        if pages in getattr(os, "sysconf_names", {}):
            return os.sysconf(pages) * os.sysconf("SC_PAGE_SIZE")
    raise ValueError(
        "memory_bytes must be given here: neither the devices nor this operating system report their memory."
    )


class CacheBytes(NamedTuple):
    """The bytes of a cache on one device: of each page index, and of what it has beside its pages."""

    of_page: Fraction
    beside: int


class PagePool(NamedTuple):
    """A pool of pages whose number is not known yet."""

    quantizer: PoolFormat
    kv_heads: int
    page_size: int
    head_dim: int


def cache_bytes(
    pools: list[PagePool],  # keys and values of every layer
    dtype: DTypeLike,
    sequences: Sequences,
    mesh: Mesh | None,
    manager: Resolver | None,
) -> CacheBytes:
    """Return the bytes of all the pools together on one device, with exact pages for ``sequences``."""
    pages = 1 if mesh is None else mesh.devices.size  # so that partitioned pages are counted right

    def bytes_of(pool: PagePool, pages: int) -> int:
        shape = pool.kv_heads, pages, pool.page_size, pool.head_dim
        return device_bytes(pool.quantizer, shape, dtype, sequences, mesh, manager)

    once = {kind: bytes_of(kind, pages) for kind in set(pools)}
    twice = {kind: bytes_of(kind, 2 * pages) for kind in set(pools)}
    total = sum(once[pool] for pool in pools)
    of_pages = sum(twice[pool] for pool in pools) - total
    return CacheBytes(Fraction(of_pages, pages), total - of_pages)
