"""The rule for shard_map, which replaces the PartitionSpec of an array by PartitionSpecs of its leaves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
from jax.sharding import PartitionSpec

from qpaged import _compat
from qpaged._compat import Aval, Operand, Pytree
from qpaged.implicit import _reports, _tree
from qpaged.implicit._rule_context import Outputs, RuleContext
from qpaged.implicit._value import ImplicitValue, is_implicit


def shard_map(ctx: RuleContext, operands: list[Operand]) -> Outputs:
    """Evaluate a shard_map as the same shard_map of the new body.

    An operand stays implicit if its leaves, divided over the devices, make up the divided array; an output
    stays implicit if its local leaves, put together, make up the global array. Others are materialized.
    """
    jaxpr = ctx.params["jaxpr"]
    operands, in_specs = _operands_and_specs(ctx, operands)
    local_outs = _local_outputs(ctx, operands, in_specs)
    leaf_specs_of_outs = []
    final_specs = []
    for local_out, spec, aval in zip(local_outs, ctx.params["out_specs"], ctx.out_avals, strict=True):
        leaf_specs = _leaf_specs_of_output(ctx, local_out, spec, aval)
        leaf_specs_of_outs.append(leaf_specs)
        final_specs.append(spec if leaf_specs is None else leaf_specs)  # shard_map takes trees of specs

    def body(*inner: Operand) -> list[Operand]:
        outs = ctx.evaluate(jaxpr, inner)
        return [
            ctx.to_dense(out) if leaf_specs is None else out
            for out, leaf_specs in zip(outs, leaf_specs_of_outs, strict=True)
        ]

    return _compat.shard_map(body, ctx.params, in_specs, final_specs)(*operands)


# Operands: whether their leaves can be divided.


def _operands_and_specs(
    ctx: RuleContext, operands: list[Operand]
) -> tuple[list[Operand], tuple[Pytree, ...]]:
    """Return the operands, those that cannot be divided leaf by leaf materialized, and their specs."""
    new_operands, new_specs = [], []
    local_avals = ctx.params["jaxpr"].in_avals
    for operand, spec, local_aval in zip(operands, ctx.params["in_specs"], local_avals, strict=True):
        if is_implicit(operand) and not _divides_leafwise(ctx, operand, spec, local_aval):
            operand = ctx.to_dense(operand)
        new_operands.append(operand)
        new_specs.append(_leaf_specs(operand, spec) if is_implicit(operand) else spec)
    return new_operands, tuple(new_specs)


def _leaf_specs(value: ImplicitValue, spec: PartitionSpec) -> Pytree:
    """Return the spec of each leaf: that of the array, but axes of size 1 are replicated for broadcasting."""

    def leaf_spec(leaf: jax.Array) -> PartitionSpec:
        entries = [None if size == 1 else entry for size, entry in zip(leaf.shape, spec, strict=False)]
        return PartitionSpec(*entries)

    return jax.tree_util.tree_map(leaf_spec, value)


def _divides_leafwise(ctx: RuleContext, value: ImplicitValue, spec: PartitionSpec, local_aval: Aval) -> bool:
    """Return True if the local parts of the leaves make up the local part of the array."""
    if _cuts_whole_axes(value, spec):
        return False
    leaves, tree = _tree.flatten_fully(value)
    local_leaves = []
    for leaf, leaf_spec in zip(leaves, tree.flatten_up_to(_leaf_specs(value, spec)), strict=True):
        axes = _axes(ctx, leaf, leaf_spec)
        if any(axis.size % axis.shards for axis in axes):
            return False  # JAX refuses to divide an axis unevenly
        local_leaves.append(jax.ShapeDtypeStruct([axis.size // axis.shards for axis in axes], leaf.dtype))
    return ctx.materializes_to(tree.unflatten(local_leaves), local_aval)


def _cuts_whole_axes(value: ImplicitValue, spec: PartitionSpec) -> bool:
    """Return True if a spec divides an axis along which an array says that its leaves cannot be divided."""
    divided = {axis for axis, entry in enumerate(spec) if _compat.spec_axes(entry)}
    return not divided.isdisjoint(getattr(value, "whole_axes", ()))


# Outputs: whether their leaves can be put together.


def _local_outputs(
    ctx: RuleContext, operands: Sequence[Operand], in_specs: Sequence[Pytree]
) -> list[ImplicitValue | None]:
    """Return the body's implicit outputs on one device, with avals as leaves, and None for plain outputs."""
    local_outs: list[ImplicitValue | None] = []

    def probe(*inner: Operand) -> tuple[()]:
        outs = ctx.evaluate(ctx.params["jaxpr"], inner)
        # JAX may trace the body more than once; the last trace counts.
        local_outs[:] = [
            jax.tree_util.tree_map(jax.typeof, out) if is_implicit(out) else None for out in outs
        ]
        return ()

    # Which axes the leaves vary along is known only inside of a shard_map, so the body is traced in one.
    with _reports.no_reports():
        jax.eval_shape(_compat.shard_map(probe, ctx.params, in_specs, ()), *operands)
    return local_outs


def _leaf_specs_of_output(
    ctx: RuleContext, local_out: ImplicitValue | None, spec: PartitionSpec, aval: Aval
) -> Pytree | None:
    """Return specs for the leaves of an implicit output, or None if the output has to be dense."""
    if local_out is None or _cuts_whole_axes(local_out, spec):
        return None
    leaves, tree = _tree.flatten_fully(local_out)
    if not ctx.params["check_vma"] and any(1 in leaf.shape for leaf in leaves):
        return None  # JAX does not track varying axes, so an axis of size 1 may differ from device to device
    specs = []
    global_leaves = []
    for leaf in leaves:
        leaf_spec = _spec_of_output_leaf(leaf, spec, local_out.shape)
        if leaf_spec is None:
            return None
        specs.append(leaf_spec)
        global_shape = [axis.size * axis.shards for axis in _axes(ctx, leaf, leaf_spec)]
        global_leaves.append(jax.ShapeDtypeStruct(global_shape, leaf.dtype))
    if not ctx.materializes_to(tree.unflatten(global_leaves), aval):
        return None
    return tree.unflatten(specs)


def _spec_of_output_leaf(
    leaf: jax.core.ShapedArray, spec: PartitionSpec, logical_shape: Sequence[int]
) -> PartitionSpec | None:
    """Return the spec of an output's leaf, or None if it varies along axes that the spec does not have."""
    varying = _compat.varying_axes(leaf)
    entries = []
    for size, logical_size, entry in zip(leaf.shape, logical_shape, spec, strict=False):
        is_broadcast = size == 1 and logical_size != 1
        if is_broadcast and varying.isdisjoint(_compat.spec_axes(entry)):
            entry = None  # the same on all devices, so it is one replicated axis rather than shards of one
        entries.append(entry)
    named = {axis for entry in entries for axis in _compat.spec_axes(entry)}
    if not varying <= named:
        return None
    return PartitionSpec(*entries)


class _Axis(NamedTuple):
    """The size of an array's axis, and the number of devices it is divided over."""

    size: int
    shards: int


def _axes(ctx: RuleContext, leaf: Aval, spec: PartitionSpec) -> list[_Axis]:
    mesh_sizes = ctx.params["mesh"].shape
    shards = [1] * leaf.ndim  # the spec may be shorter than the shape
    for index, entry in enumerate(spec):
        shards[index] = math.prod(mesh_sizes[axis] for axis in _compat.spec_axes(entry))
    return [_Axis(size, count) for size, count in zip(leaf.shape, shards, strict=True)]
