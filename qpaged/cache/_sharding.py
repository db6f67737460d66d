"""How pools are laid over a mesh."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from qpaged._arguments import check_type, shown
from qpaged._compat import spec_axes

KV_HEAD = "__KV_HEAD__"
EMPTY = "_"
MODE = "__prefill__"


class Resolver(Protocol):
    """What lays pools over a mesh: a :class:`PartitionManager`, or anything with this method."""

    def resolve(self, axes: Sequence[str], mode: str = MODE, shape: Sequence[int] = ()) -> PartitionSpec:
        """Return the partition of an array whose axes have these meanings."""


def check_layout(mesh: object, manager: object) -> None:
    """Raise TypeError unless these are a mesh and what lays pools over it, or None."""
    rule, advice = "a jax.sharding.Mesh or None", "None is for the default device"
    check_type("mesh", mesh, Mesh | AbstractMesh | None, rule, advice)
    if manager is not None and not callable(getattr(manager, "resolve", None)):
        raise TypeError(
            f"partition_manager must be None or have a method resolve, but got {shown(manager)}; give a "
            f"qpaged.PartitionManager, say."
        )


@dataclass(frozen=True)
class PartitionManager:
    """The default rules: KV heads over one mesh axis, sequences and their pages over another.

    Fewer heads than devices are stored as often as the devices ask; heads that neither divide the devices nor
    are divided by them are whole on each. Anything with this ``resolve`` can stand in its place, and divides
    what it says, but no sequences.

    Attributes:
        mesh: the devices, for :meth:`resolve`, which divides nothing if it is None.
        kv_head_axis: the mesh axis that KV heads are divided over.
        group_axis: the mesh axis that sequences are divided over, in groups with pages of their own.
        context_axis: the mesh axis that the pages of each sequence are divided over, by their numbers.
    """

    mesh: Mesh | None = None
    kv_head_axis: str = "tp"
    group_axis: str = "dp"
    context_axis: str = "cp"

    def resolve(self, axes: Sequence[str], mode: str = MODE, shape: Sequence[int] = ()) -> PartitionSpec:
        """Return the partition of an array with axes of these meanings: ``"__KV_HEAD__"``, or ``"_"``."""
        if self.mesh is None:
            return PartitionSpec(*(None for _ in axes))
        over_heads = PartitionSpec(*(self.kv_head_axis if axis == KV_HEAD else None for axis in axes))
        return leaf_spec(over_heads, shape, self.mesh)


def leaf_spec(spec: PartitionSpec, shape: Sequence[int], mesh: Mesh) -> PartitionSpec:
    """Return ``spec`` without the mesh axes that this mesh lacks, or that do not divide ``shape``."""
    entries = []
    for entry, length in zip(spec, shape, strict=False):
        entries.append(entry if _divides(entry, length, mesh) else None)
    return PartitionSpec(*entries)


def _divides(entry: str | tuple[str, ...] | None, length: int, mesh: Mesh) -> bool:
    """Return True if the mesh has the axes of a spec's entry, and they divide ``length``."""
    if entry is PartitionSpec.UNCONSTRAINED:  # pools are made, and nothing would choose for them
        return False
    axes = spec_axes(entry)
    if any(axis not in mesh.shape for axis in axes):
        return False
    return length % int(np.prod([mesh.shape[axis] for axis in axes])) == 0
