"""The description of a cache: its arrays, their roles and their axes."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Literal, TypeAlias

import jax.numpy as jnp
from jax.typing import DTypeLike

Role: TypeAlias = Literal["key", "value", "key and value"]


@dataclass(frozen=True)
class CacheLeaf:
    """One array of a cache.

    Attributes:
        path: the way to it among the step's arguments: the argument's name, then keys, with slashes between.
        shape: of the array in the example.
        dtype: of the array, a float.
        role: whether dots read it as keys, as values, or as both.
        axes: a name for each axis: "layers", "pair" (keys and values of one array), "batch", "length",
            "heads" or "head_dim".
        layer: its number among the arrays of its role, in the order of the program; None if it holds several
            layers.
        output: the path of the output that returns it; None if none does.
        evidence: what the program does to it, and at which line.
        zero_test: the operation that takes slots for zeros to which nothing was written, a comparison with
            zero or an addition; None if there is none.
    """

    path: str
    shape: tuple[int, ...]
    dtype: DTypeLike
    role: Role
    axes: tuple[str, ...]
    layer: int | None
    output: str | None
    evidence: tuple[str, ...]
    zero_test: str | None = None

    @property
    def argument(self) -> str:
        """The name of the argument that holds the array."""
        return self.path.split("/")[0]

    def axis(self, name: str) -> int:
        """Return the number of the axis with this name."""
        return self.axes.index(name)

    def __str__(self) -> str:
        sizes = ", ".join(f"{name} {size}" for name, size in zip(self.axes, self.shape, strict=True))
        layer = "several layers" if self.layer is None else f"layer {self.layer}"
        head = f"{self.path}: {self.role}, {layer}, {jnp.dtype(self.dtype).name} ({sizes})"
        return "\n".join([head, *(f"    {line}" for line in self.evidence)])


@dataclass(frozen=True)
class FoundCache:
    """The cache of a step, array by array; ``print`` shows it with the evidence."""

    leaves: tuple[CacheLeaf, ...]

    @property
    def arguments(self) -> tuple[str, ...]:
        """The names of the arguments that hold it, in their order."""
        return tuple(dict.fromkeys(leaf.argument for leaf in self.leaves))

    def __str__(self) -> str:
        counts = Counter(leaf.role for leaf in self.leaves)
        roles = ", ".join(f"{count} {role}" for role, count in counts.items())
        head = f"{len(self.leaves)} arrays in {', '.join(self.arguments)}: {roles}"
        return "\n".join([head, *map(str, self.leaves)])
