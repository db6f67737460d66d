"""How pools are laid over a mesh."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jax.sharding import Mesh, PartitionSpec

KV_HEAD = "__KV_HEAD__"
EMPTY = "_"
MODE = "__prefill__"


@dataclass(frozen=True)
class PartitionManager:
    """The default rules: KV heads over one mesh axis where they divide, everything else whole.

    Anything with this ``resolve`` can stand in its place.

    Attributes:
        mesh: the devices; None partitions nothing.
        kv_head_axis: the mesh axis that KV heads are divided over.
    """

    mesh: Mesh | None = None
    kv_head_axis: str = "tp"

    def resolve(self, axes: Sequence[str], mode: str = MODE, shape: Sequence[int] = ()) -> PartitionSpec:
        """The partition of an array whose axes have these meanings, ``"__KV_HEAD__"`` or ``"_"`` (none)."""
        wanted = PartitionSpec(*(self.kv_head_axis if axis == KV_HEAD else None for axis in axes))
        if self.mesh is None:
            return PartitionSpec(*(None for _ in axes))
        return leaf_spec(wanted, shape, self.mesh)


def leaf_spec(spec: PartitionSpec, shape: Sequence[int], mesh: Mesh) -> PartitionSpec:
    """``spec`` without the mesh axes that this mesh lacks, or that do not divide ``shape``."""

    def fits(names, length: int) -> bool:
        names = names if isinstance(names, tuple) else (names,)
        known = all(name in mesh.shape for name in names)
        return known and length % int(np.prod([mesh.shape[name] for name in names])) == 0

    parts = [
        None if part is None or not fits(part, length) else part
        for part, length in zip(spec, shape, strict=False)
    ]
    return PartitionSpec(*parts)
