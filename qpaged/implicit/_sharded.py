"""shard_map inside a function of implicit arrays: the spec of an array becomes specs of its leaves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import PartitionSpec

from qpaged import _compat
from qpaged.implicit import _notes, _tree
from qpaged.implicit._loops import fits, step_avals
from qpaged.implicit._step import Outputs, Step
from qpaged.implicit._value import is_implicit


def shard_map(step: Step, values: list[Any]) -> Outputs:
    """The same shard_map around the new body.

    An operand stays implicit if its divided leaves make up the divided array, an output if its local
    leaves put together make up the whole one. The others are materialized.
    """
    jaxpr, specs = step.params["jaxpr"], step.params["in_specs"]
    values = [
        value if _divides(value, spec, aval, step) else step.dense(value)
        for value, spec, aval in zip(values, specs, step_avals(jaxpr), strict=True)
    ]
    in_specs = tuple(_in_specs(value, spec) for value, spec in zip(values, specs, strict=True))
    local = _local_outputs(step, values, in_specs)
    out_specs = [
        _out_specs(out, spec, aval, step)
        for out, spec, aval in zip(local, step.params["out_specs"], step.out_avals, strict=True)
    ]

    def body(*inner: Any) -> list[Any]:
        outs = step.evaluate(jaxpr, inner)
        return [step.dense(out) if specs is None else out for out, specs in zip(outs, out_specs, strict=True)]

    final = [
        spec if specs is None else specs
        for spec, specs in zip(step.params["out_specs"], out_specs, strict=True)
    ]
    return _compat.shard_map(body, step.params, in_specs, final)(*values)


def _in_specs(value: Any, spec: PartitionSpec) -> Any:
    """The spec of an array for each of its leaves. An axis of size 1 is broadcast, so it is replicated."""
    if not is_implicit(value):
        return spec
    return jax.tree_util.tree_map(
        lambda leaf: PartitionSpec(
            *(None if size == 1 else entry for size, entry in zip(leaf.shape, spec, strict=False))
        ),
        value,
    )


def _divides(value: Any, spec: PartitionSpec, aval: Any, step: Step) -> bool:
    if not is_implicit(value):
        return True
    leaves, tree = _tree.flatten_fully(value)
    specs = tree.flatten_up_to(_in_specs(value, spec))
    shards = [_shards(leaf, leaf_spec, step) for leaf, leaf_spec in zip(leaves, specs, strict=True)]
    if any(size % n for leaf, counts in zip(leaves, shards, strict=True) for size, n in counts):
        return False
    local = [
        jax.ShapeDtypeStruct([size // n for size, n in counts], leaf.dtype)
        for leaf, counts in zip(leaves, shards, strict=True)
    ]
    return fits(tree.unflatten(local), aval, step)


def _out_specs(out: Any, spec: PartitionSpec, aval: Any, step: Step) -> Any:
    """Specs for the leaves of an implicit output, or None if it has to be dense."""
    if not is_implicit(out):
        return None
    leaves, tree = _tree.flatten_fully(out)
    found = [_out_leaf_spec(leaf, spec, out.shape) for leaf in leaves]
    specs = [leaf_spec for leaf_spec in found if leaf_spec is not None]
    if len(specs) < len(leaves) or (not step.params["check_vma"] and any(1 in leaf.shape for leaf in leaves)):
        return None  # without varying axes nobody can say whether an axis of size 1 differs by device
    whole = [
        jax.ShapeDtypeStruct([size * n for size, n in _shards(leaf, leaf_spec, step)], leaf.dtype)
        for leaf, leaf_spec in zip(leaves, specs, strict=True)
    ]
    return tree.unflatten(specs) if fits(tree.unflatten(whole), aval, step) else None


def _out_leaf_spec(leaf: Any, spec: PartitionSpec, shape: Sequence[int]) -> PartitionSpec | None:
    """A leaf's axis of size 1 that is the same on all devices is broadcast; others are shards."""
    varying = _compat.varying_axes(leaf)
    entries = [
        None if size == 1 and logical != 1 and not varying & {*_compat.spec_axes(entry)} else entry
        for size, logical, entry in zip(leaf.shape, shape, spec, strict=False)
    ]
    kept = {axis for entry in entries for axis in _compat.spec_axes(entry)}
    return PartitionSpec(*entries) if varying <= kept else None


def _local_outputs(step: Step, values: Sequence[Any], in_specs: Sequence[Any]) -> list[Any]:
    """The implicit outputs of the body on one device, with avals as leaves; None for plain ones."""
    seen: list[Any] = []

    def probe(*inner: Any) -> tuple[()]:
        outs = step.evaluate(step.params["jaxpr"], inner)
        seen[:] = [jax.tree_util.tree_map(jax.typeof, out) if is_implicit(out) else None for out in outs]
        return ()

    with _notes.silence():
        jax.eval_shape(_compat.shard_map(probe, step.params, in_specs, ()), *values)
    return seen


def _shards(leaf: Any, spec: PartitionSpec, step: Step) -> list[tuple[int, int]]:
    """Each of a leaf's axes with the number of devices it is divided over."""
    sizes = step.params["mesh"].shape
    counts = [math.prod(sizes[axis] for axis in _compat.spec_axes(entry)) for entry in spec]
    return [(size, n) for size, n in zip(leaf.shape, counts + [1] * leaf.ndim, strict=False)]
