"""Static scales that are given to the pools of a cache."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from qpaged import pools
from qpaged._arguments import shown
from qpaged.formats import CacheScales, check_formats, scale_values
from qpaged.pools import Pages

SIDES = ("key", "value")


def set_scales(name: str, pages: Pages, scales: ArrayLike | None) -> Pages:
    """Return a pool with static scales, one for each KV head or one for all; as it is for None.

    Raises:
        TypeError, ValueError: the pool has no static scales, or cannot have these.
    """
    if scales is None:
        return pages
    before = pools.static_scales(pages)
    if before is None:
        raise ValueError(
            f"{name} must be None for pages without static scales, but scales came for "
            f"{pools.describe(pages)} pages; formats as fp8_e4m3:tensor and fp8_e4m3:head have them."
        )
    if isinstance(scales, jax.core.Tracer):  # its values are not known yet
        values: jax.Array | np.ndarray = scales.astype(before.dtype)
    else:
        values = scale_values(name, scales)
    heads = len(before)
    if values.size not in (1, heads) or values.ndim > 1:
        rule = "one number" if heads == 1 else f"one number, or one for each of the {heads} KV heads"
        raise ValueError(
            f"{name} must be {rule} for {pools.format_of(pages)} pages, but came with shape "
            f"{tuple(values.shape)}; give scales of this shape."
        )
    given = jnp.broadcast_to(jnp.asarray(values).reshape(-1, 1, 1, 1), before.shape)
    if isinstance(before, jax.Array) and not isinstance(before, jax.core.Tracer):
        given = jax.device_put(given, before.sharding)
    return pools.with_static_scales(pages, given)


def scales_of_layer(
    scales: CacheScales, layer: int, all_pages: tuple[Pages, Pages]
) -> list[np.ndarray | None]:
    """Return what the pools of a layer's keys and values take of a cache's scales; None of others.

    A pool with one scale takes the largest of its heads'.
    """
    taken: list[np.ndarray | None] = []
    for index, (name, pages) in enumerate(zip(SIDES, all_pages, strict=True)):
        before = pools.static_scales(pages)
        if before is None:
            taken.append(None)
            continue
        check_formats(scales, index, f"{name}s", pools.packed_format(pages))
        given = getattr(scales, name)[layer]
        taken.append(given.max() if len(before) == 1 else given)
    return taken


def check_scales(scales: object, num_layers: int, kv_heads: int, has_static_scales: bool) -> None:
    """Raise unless these are scales of as many layers and KV heads, and a pool takes some.

    Raises:
        TypeError, ValueError: of another kind, or not for this cache.
    """
    if not isinstance(scales, CacheScales):
        raise TypeError(
            f"scales must be a qpaged.CacheScales, but got {shown(scales)}; CacheScales.load and "
            f"qpaged.models.read_scales read files."
        )
    scales.check_sizes(num_layers, kv_heads)
    if not has_static_scales:
        raise ValueError(
            "scales must be left out for a cache whose formats have no static ones; make the cache with such "
            "a format, as fp8_e4m3:tensor."
        )
