"""How the pools of a view lie over a mesh, and calls that each device answers with what it holds.

Under Auto axes a program sees neither how an array lies nor, outside of ``jax.set_mesh``, which mesh there
is. A view therefore keeps both as static data, and its calls open a ``jax.shard_map``: kernels run on every
device, on its own heads and its own sequences. No key and no value goes from one device to another, but for
pages that are copied where devices share those of a sequence.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from qpaged import pools
from qpaged._compat import current_mesh, has_explicit_meshes, is_explicit, manual_axes, spec_axes
from qpaged._eager import compiled_if_eager
from qpaged.cache._sharding import EMPTY, KV_HEAD, MODE, PartitionManager, Resolver
from qpaged.cache._step_tokens import StepTokens

Specs: TypeAlias = Any
"""A tree of PartitionSpecs, as that of the arrays that it is for."""
Axes: TypeAlias = tuple[str, ...]

REPLICATED = PartitionSpec()


@dataclass(frozen=True)
class Placement:
    """Where pools lie; hashable, since programs depend on it.

    Attributes:
        mesh: with its devices, if they are there.
        heads: the mesh axes that KV heads are divided over; () if each device has all.
        groups: the mesh axes that sequences and their pages are divided over, in groups; () if there is one.
        context: the mesh axes that the pages of a group are divided over, the first ones on the first device;
            () if each device has all of them.
    """

    mesh: Mesh | AbstractMesh
    heads: Axes = ()
    groups: Axes = ()
    context: Axes = ()

    @classmethod
    def of(
        cls, mesh: Mesh | AbstractMesh | None, manager: Resolver | None, shape: Sequence[int]
    ) -> "Placement | None":
        """Return how pools of a shape are laid over a mesh; None where the compiler is left to divide them.

        That is on one device, for managers that divide other axes than heads, and for old versions of JAX.
        """
        kv_heads = shape[0]
        if mesh is None or mesh.size == 1 or not has_explicit_meshes():
            return None
        if manager is None or type(manager) is PartitionManager:  # a class of its own may resolve otherwise
            manager = PartitionManager() if manager is None else manager
            heads: Axes = (manager.kv_head_axis,) if mesh.shape.get(manager.kv_head_axis, 1) > 1 else ()
            if heads and kv_heads % mesh.shape[heads[0]] and mesh.shape[heads[0]] % kv_heads:
                heads = ()  # neither divides the other
            groups, context = (
                (axis,) if mesh.shape.get(axis, 1) > 1 else ()
                for axis in (manager.group_axis, manager.context_axis)
            )
            return cls(mesh, heads, groups, context)
        spec = manager.resolve([KV_HEAD, EMPTY, EMPTY, EMPTY], mode=MODE, shape=tuple(shape))
        if any(entry is not None for entry in spec[1:]) or PartitionSpec.UNCONSTRAINED in spec:
            return None
        heads = spec_axes(spec[0]) if spec else ()
        known = all(axis in mesh.shape for axis in heads)
        return cls(mesh, heads) if known and kv_heads % _size(mesh, heads) == 0 else None

    @property
    def without_context(self) -> "Placement":
        """The placement of pages that each device of a group has."""
        return dataclasses.replace(self, context=())

    @property
    def num_head_shards(self) -> int:
        """How many parts the heads are divided into."""
        return _size(self.mesh, self.heads)

    def stored_heads(self, kv_heads: int) -> int:
        """Return the heads of a pool: where there are more devices than heads, each of these has copies."""
        return max(kv_heads, self.num_head_shards)

    @property
    def context_size(self) -> int:
        """How many devices share the pages of a group."""
        return _size(self.mesh, self.context)

    def local_pages(self, pages: int) -> int:
        """Return the pages that each device has, of those of a group.

        Raises:
            ValueError: they do not divide.
        """
        if pages % self.context_size:
            raise ValueError(
                f"num_pages_per_layer must be a multiple of the {self.context_size} devices that share the "
                f"pages of a sequence, but came as {pages}."
            )
        return pages // self.context_size

    @property
    def open_axes(self) -> frozenset[str]:
        """The mesh axes that are not divided by a ``shard_map`` of the caller already."""
        return frozenset(self.mesh.axis_names) - manual_axes()

    @property
    def open_heads(self) -> Axes | None:
        """The axes of heads that are still to be divided, as an entry of a PartitionSpec."""
        return self._open(self.heads)

    @property
    def open_groups(self) -> Axes | None:
        """The axes of groups likewise."""
        return self._open(self.groups)

    @property
    def open_context(self) -> Axes | None:
        """The axes of context likewise."""
        return self._open(self.context)

    @property
    def num_groups(self) -> int:
        """How many groups of sequences are still to be divided."""
        return _size(self.mesh, self.open_groups or ())

    @property
    def is_open(self) -> bool:
        """True if calls have axes to divide."""
        return bool(self.open_axes)

    def pool_specs(self, leaves: Sequence[jax.Array | jax.ShapeDtypeStruct]) -> list[PartitionSpec]:
        """Return the partition of each array of a pool, heads and then pages; what does not divide is whole.

        Lists of exact pages are those of a group.
        """
        heads, axes = self.open_heads, (self.open_groups or ()) + (self.open_context or ())
        num_heads, num_parts = _size(self.mesh, heads or ()), _size(self.mesh, axes)
        specs = []
        for leaf in leaves:
            if leaf.ndim == 1:
                specs.append(PartitionSpec(axes or None))
            elif leaf.ndim == 0:
                specs.append(REPLICATED)
            else:
                of_heads = heads if leaf.shape[0] % num_heads == 0 else None
                of_pages = axes or None if leaf.shape[1] % num_parts == 0 else None
                specs.append(PartitionSpec(of_heads, of_pages))
        return specs

    def whole_tokens(self, rows: jax.Array) -> jax.Array:
        """Return rows [tokens, heads, ...], of an Explicit mesh, with the tokens of all groups everywhere."""
        if not self.open_groups or not is_explicit(self.mesh):
            return rows
        return self._placed(rows, PartitionSpec(None, self.open_heads))

    def run(
        self, body: Callable[..., Any], operands: tuple[Any, ...], specs: tuple[Specs, ...], out_specs: Specs
    ) -> Any:
        """Return what ``body`` makes of each device's parts of the operands.

        Args:
            body: a function of one device's arrays.
            operands: trees of arrays.
            specs: how each of them is divided.
            out_specs: how what the body returns is put together.
        """
        operands = jax.tree_util.tree_map(self._placed, operands, specs)
        is_current = current_mesh() is not None
        run = jax.shard_map(
            body,
            mesh=None if is_current else self.mesh,
            in_specs=specs,
            out_specs=out_specs,
            axis_names=set(self.open_axes),
        )
        return run(*operands)

    def change(
        self, change: Callable[..., Any], pages: Any, operands: tuple[Any, ...], specs: tuple[Specs, ...]
    ) -> Any:
        """Return pools after ``change(pages, *operands)`` of what each device holds of them."""
        leaves, tree = jax.tree_util.tree_flatten(pages)
        trees = []

        def body(leaves: list[jax.Array], *operands: Any) -> list[jax.Array]:
            changed, changed_tree = jax.tree_util.tree_flatten(
                change(jax.tree_util.tree_unflatten(tree, leaves), *operands)
            )
            trees.append(changed_tree)
            return changed

        of_leaves = self.pool_specs(leaves)
        changed = self.run(body, (leaves, *operands), (of_leaves, *specs), of_leaves)
        return jax.tree_util.tree_unflatten(trees[-1], changed)

    def repeat_heads(self, rows: jax.Array, stored_heads: int) -> jax.Array:
        """Return rows [tokens, kv_heads, ...] with as many heads as a pool stores."""
        copies = stored_heads // rows.shape[1]
        if not self.open_heads or copies == 1:
            return rows
        return jnp.repeat(self._placed(rows, REPLICATED), copies, axis=1)

    def row_specs(self, step: StepTokens) -> PartitionSpec:
        """Return how rows [tokens, heads, ...] of a step are divided."""
        return PartitionSpec(None if step.is_prefill else self.open_groups, self.open_heads)

    def _open(self, axes: Axes) -> Axes | None:
        return tuple(axis for axis in axes if axis in self.open_axes) or None

    def _placed(self, operand: Any, spec: PartitionSpec) -> jax.Array:
        """Return an operand laid out so, as meshes with Explicit axes ask."""
        array = jnp.asarray(operand)
        if not is_explicit(self.mesh):
            return array
        mesh = current_mesh() or self.mesh
        return jax.sharding.reshard(array, NamedSharding(mesh, spec))


@compiled_if_eager(static_argnums=(0, 1))
def change_over_devices(
    placement: Placement, change: Callable[..., Any], pages: Any, operands: tuple[Any, ...]
) -> Any:
    """Return a pool after ``change(pages, *operands)`` of what each device holds of all of them.

    Args:
        placement: of the pool.
        change: the same function object each time.
        pages: the pool.
        operands: pages (n,), those of a group after those of another; or pools.
    """
    if not jax.tree_util.tree_leaves(pages):  # values that lie in the keys
        return change(pages, *operands)
    context = placement.open_context
    specs = []
    for operand in operands:
        leaves, tree = jax.tree_util.tree_flatten(operand)
        is_indices = isinstance(operand, jax.Array) and operand.ndim == 1  # and no plain pool
        of_leaves = placement.without_context.pool_specs(leaves)  # pages that were taken are everywhere
        if is_indices:
            of_leaves = [PartitionSpec(placement.open_groups)]
        specs.append(jax.tree_util.tree_unflatten(tree, of_leaves))

    def change_own(pages: Any, indices: jax.Array, *others: Any) -> Any:
        return change(pages, own_pages(indices, pages.shape[1], axis_index(context)), *others)

    return placement.change(change_own, pages, operands, tuple(specs))


@compiled_if_eager(static_argnums=(0, 1))
def take_over_devices(placement: Placement, sequences: int, pages: Any, indices: jax.Array) -> Any:
    """Return pages ``indices`` (n,) of so many sequences, those of a group after those of another.

    Where devices share the pages of a group, the pages that are taken, and no others, are summed over them:
    all but one have zeros for each. All of them get them.
    """
    leaves, tree = jax.tree_util.tree_flatten(pages)
    if not leaves:
        return pages
    context, count = placement.open_context, len(indices) // placement.num_groups
    trees: list[jax.tree_util.PyTreeDef] = []

    def take(leaves: list[jax.Array], indices: jax.Array) -> list[jax.Array]:
        pool = jax.tree_util.tree_unflatten(tree, leaves)
        local = pool.shape[1]
        own = own_pages(indices, local, axis_index(context))
        taken = pools.take_pages(pool, own if context is None else jnp.minimum(own, local - 1), sequences)
        if context is not None:
            scales = pools.static_scales(taken)
            taken = jax.tree_util.tree_map(functools.partial(from_owner, is_own=own < local), taken)
            taken = taken if scales is None else pools.with_static_scales(taken, scales)
        taken_leaves, taken_tree = jax.tree_util.tree_flatten(taken)
        trees.append(taken_tree)
        return taken_leaves

    def from_owner(leaf: jax.Array, is_own: jax.Array) -> jax.Array:
        if leaf.ndim < 2 or leaf.shape[1] % count:  # of no single page
            return leaf
        # Those of a flat pool are pages of one layer after those of another.
        mask = jnp.tile(is_own, leaf.shape[1] // count).reshape(1, -1, *[1] * (leaf.ndim - 2))
        bits = jax.lax.bitcast_convert_type(leaf, f"uint{8 * leaf.dtype.itemsize}")
        summed = jax.lax.psum(jnp.where(mask, bits, 0), context)
        return jax.lax.bitcast_convert_type(summed, leaf.dtype)

    flat = pools.as_flat(pages)
    kept = leaves if flat is None or flat.layer is None else jax.tree_util.tree_leaves(flat.pages)
    taken = placement.run(
        take,
        (leaves, indices),
        (placement.pool_specs(leaves), PartitionSpec(placement.open_groups)),
        placement.without_context.pool_specs(kept),
    )
    return jax.tree_util.tree_unflatten(trees[-1], taken)


def num_groups(placement: Placement | None) -> int:
    """Return how many groups of sequences a call is to be divided into: one, without a placement."""
    return 1 if placement is None else placement.num_groups


def own_pages(pages: jax.Array, local_pages: int, index: jax.Array | None) -> jax.Array:
    """Return the numbers that pages of a group have on one of its devices, "no page" for those of others.

    Args:
        pages: of any shape, in numbers of the group.
        local_pages: pages of each device.
        index: which of the devices; None if there is one.
    """
    if index is None:
        return pages
    own = pages - index * local_pages
    return jnp.where((own >= 0) & (own < local_pages), own, local_pages)


def axis_index(axes: Axes | None) -> jax.Array | None:
    """Return the number of a device along mesh axes, within :meth:`Placement.run`; None without axes."""
    return jax.lax.axis_index(axes) if axes else None


def _size(mesh: Mesh | AbstractMesh, axes: Axes) -> int:
    return math.prod(mesh.shape[axis] for axis in axes)
