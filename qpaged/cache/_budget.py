"""How many pages fit into a device's memory."""

import os
import warnings
from fractions import Fraction
from typing import Any

import jax
from jax.sharding import Mesh

from qpaged.cache._pages import PagesFormat, device_bytes


class HostMemoryWarning(UserWarning):
    """A device that does not tell its memory was given a share of the host's."""


def available_bytes(mesh: Mesh | None, device: Any, utilization: float, memory_bytes: int | None) -> int:
    """Bytes that the cache may take on each device.

    ``utilization`` of ``memory_bytes``, or of what the devices report, less what is in use there already;
    the least over the mesh. Devices that report nothing share what is free on the host.
    """
    if memory_bytes is not None:
        return int(memory_bytes * utilization)
    devices = [device] if mesh is None else list(mesh.devices.flat)
    mine = jax.process_index()
    stats = [device.memory_stats() or {} for device in devices if device.process_index == mine]
    limits = [int(s.get("bytes_reservable_limit", s.get("bytes_limit", 0))) for s in stats]
    if stats and all(limits):
        used = [s.get("bytes_in_use", 0) for s in stats]
        return min(int(limit * utilization) - use for limit, use in zip(limits, used, strict=True))
    share = _free_host_bytes() // max(1, len(stats))
    warnings.warn(
        f"{devices[0].device_kind} devices do not report their memory; the cache takes {utilization:.0%} of "
        f"{share:,} bytes, each device's share of the host's free memory. Pass memory_bytes= to say "
        f"otherwise.",
        HostMemoryWarning,
        stacklevel=3,
    )
    return int(share * utilization)


def default_device() -> Any:
    """The device on which arrays are made where none is named."""
    device = getattr(jax.config, "jax_default_device", None) or jax.devices()[0]
    return jax.local_devices(backend=device)[0] if isinstance(device, str) else device


def _free_host_bytes() -> int:
    for pages in ("SC_AVPHYS_PAGES", "SC_PHYS_PAGES"):
        if pages in getattr(os, "sysconf_names", {}):
            return os.sysconf(pages) * os.sysconf("SC_PAGE_SIZE")
    raise ValueError(
        "memory_bytes must be given here: neither the devices nor this operating system report their memory."
    )


def bytes_per_page(
    formats: list[PagesFormat], shape: tuple[int, int, int], dtype: Any, mesh: Mesh | None, manager: Any
) -> Fraction:
    """Bytes that one page index takes on one device, over all the pools.

    Args:
        formats: the format of every pool: keys and values of every layer.
        shape: (kv_heads, page_size, head_dim).
    """
    kv_heads, page_size, head_dim = shape
    pages = 1 if mesh is None else mesh.devices.size  # so that partitioned pages are counted right
    pool = (kv_heads, pages, page_size, head_dim)
    each = {format: device_bytes(format, pool, dtype, mesh, manager) for format in set(formats)}
    return Fraction(sum(each[format] for format in formats), pages)
