"""What each device holds of a cache: which group's pages, which of them, and which KV heads."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding

from qpaged.cache import PagedAttentionCache
from qpaged.cache._placement import num_groups
from qpaged.pools import Pages


class Part(NamedTuple):
    """One of equal parts that something is divided into, as KV heads are over devices.

    Attributes:
        number: from 0.
        total: how many parts there are.
    """

    number: int
    total: int

    def heads(self, kv_heads: int) -> range:
        """Return the KV heads of the part, of so many, as :meth:`Placement.of` divides them.

        That is one head, which others have too, where there are more parts than heads; and all of them where
        neither number divides the other.
        """
        if kv_heads % self.total == 0:
            size = kv_heads // self.total
            return range(self.number * size, (self.number + 1) * size)
        if self.total % kv_heads == 0:
            head = self.number * kv_heads // self.total
            return range(head, head + 1)
        return range(kv_heads)

    def is_first(self, kv_heads: int) -> bool:
        """Return True unless the part before it has the same heads."""
        return self.number == 0 or self.heads(kv_heads) != self._replace(number=self.number - 1).heads(
            kv_heads
        )


class Shard(NamedTuple):
    """What one device holds.

    Attributes:
        device: None for arrays as they are: on one device, or where the compiler divides them.
        group: the group of sequences.
        part: which heads.
        pages: the pages of the group, in its own numbers.
        is_copy: True if another device holds the same, along a mesh axis that the cache does not use.
    """

    device: jax.Device | None
    group: int
    part: Part
    pages: range
    is_copy: bool = False

    def own(self, pool: Pages) -> Pages:
        """Return a pool as the device has it."""

        def of_device(array: jax.Array) -> jax.Array:
            return next(shard.data for shard in array.addressable_shards if shard.device == self.device)

        return pool if self.device is None else jax.tree_util.tree_map(of_device, pool)

    def own_pages(self, pages: np.ndarray) -> np.ndarray:
        """Return pages (n,) of the group in the device's numbers, "no page" for those of others."""
        own = pages - self.pages.start
        return np.where((own >= 0) & (own < len(self.pages)), own, len(self.pages)).astype(np.int32)


def shards_of(cache: PagedAttentionCache) -> list[Shard]:
    """Return what each device of this process holds.

    Raises:
        ValueError: layers over other devices than others, or pools over processes in an order that is not
            known.
    """
    pages, placements = cache.views[0].metadata.num_pages_per_layer, [view.placement for view in cache.views]
    if (
        len({placement and (placement.mesh, placement.groups, placement.context) for placement in placements})
        > 1
    ):
        raise ValueError(
            "cache must have all its layers over the same devices, but has them over different ones."
        )
    placement = placements[0]
    if placement is None or not _lies_as_placed(cache):
        _check_whole_here(cache)
        return [Shard(None, 0, Part(0, 1), range(pages))]
    assert isinstance(placement.mesh, Mesh)  # whose devices have the arrays
    # Layers whose heads do not divide are whole on each device, as Part.heads has it.
    heads = max((each.heads for each in placements if each is not None), key=len)
    local_pages = placement.local_pages(pages)
    shards = []
    for where, device in np.ndenumerate(placement.mesh.devices):
        number = dict(zip(placement.mesh.axis_names, where, strict=True))
        group, part, context = (
            _along(axes, placement.mesh, number) for axes in (placement.groups, heads, placement.context)
        )
        start = context.number * local_pages
        used = {*placement.groups, *heads, *placement.context}
        is_copy = any(index for axis, index in number.items() if axis not in used)
        if device.process_index == jax.process_index():
            own = range(start, start + local_pages)
            shards.append(Shard(device, group.number, part, own, is_copy))
    return shards


def _lies_as_placed(cache: PagedAttentionCache) -> bool:
    """Return True if every array lies as its view says, and not where its caller has put it since."""
    for view in cache.views:
        placement = view.placement
        if placement is None or isinstance(placement.mesh, AbstractMesh):
            return False
        for pool in (view.key_pages, view.value_pages):
            leaves = jax.tree_util.tree_leaves(pool)
            for leaf, spec in zip(leaves, placement.pool_specs(leaves), strict=True):
                sharding = getattr(leaf, "sharding", None)
                placed = NamedSharding(placement.mesh, spec)
                if sharding is None or not sharding.is_equivalent_to(placed, leaf.ndim):
                    return False
    return True


def _check_whole_here(cache: PagedAttentionCache) -> None:
    """Raise ValueError unless arrays that lie anyhow are all here, of one group, and each head once."""
    leaves = jax.tree_util.tree_leaves(cache)
    is_here = all(getattr(leaf, "is_fully_addressable", True) for leaf in leaves)
    for view in cache.views:
        groups = num_groups(view.placement)
        is_once = view.key_pages.shape[0] == view.metadata.num_kv_heads
        if not is_here or groups > 1 or not is_once:
            raise ValueError(
                "cache must lie as init_cache lays it over its mesh, to be in files, but its arrays were put "
                "elsewhere; put them where those of a fresh cache lie: jax.device_put(leaf, fresh.sharding)."
            )


def _along(axes: Sequence[str], mesh: Mesh, number: Mapping[str, int]) -> Part:
    """Return where a device is along mesh axes, as ``lax.axis_index`` counts, from its number along each."""
    index, count = 0, 1
    for axis in axes:
        index, count = index * mesh.shape[axis] + number[axis], count * mesh.shape[axis]
    return Part(index, count)


def join_shards(fresh: Pages, shards: Sequence[Shard], held: Sequence[Pages]) -> Pages:
    """Return a pool of what each device of this process holds, which lies as a fresh one does."""
    if shards[0].device is None:
        return held[0]

    def of_arrays(like: jax.Array, *own: jax.Array) -> jax.Array:
        return jax.make_array_from_single_device_arrays(like.shape, like.sharding, list(own))

    return jax.tree_util.tree_map(of_arrays, fresh, *held)
