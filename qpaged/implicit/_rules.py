"""Rules for primitives that call functions or that say nothing about values.

`RULES` lists every primitive with a rule of its own, here and in the modules next to this one.
"""

from __future__ import annotations

from typing import Any

import jax

from qpaged import _compat
from qpaged.implicit import _tree
from qpaged.implicit._branches import cond
from qpaged.implicit._calls import jit
from qpaged.implicit._derivatives import custom_jvp, custom_vjp
from qpaged.implicit._loops import scan, while_loop
from qpaged.implicit._sharded import shard_map
from qpaged.implicit._step import Outputs, Rule, Step
from qpaged.implicit._value import is_implicit


def inline(step: Step, values: list[Any]) -> Outputs:
    """A call that means nothing but its body."""
    jaxpr = step.params.get("call_jaxpr", step.params.get("jaxpr"))
    return step.evaluate(jaxpr, values)


def by_platform(step: Step, values: list[Any]) -> Outputs:
    """What is computed by default: kernels do not read implicit arrays."""
    return step.evaluate(step.params["default"], values)


def checkpoint(step: Step, values: list[Any]) -> Outputs:
    """Bound again around the new body, so that policy and differentiation state stay what they were."""
    leaves, tree = _tree.flatten_fully(values)
    out_tree: Any = None

    def flat(*inner: Any) -> list[Any]:
        nonlocal out_tree
        outs = step.evaluate(step.params["jaxpr"], tree.unflatten(inner))
        found, out_tree = _tree.flatten_fully(list(outs))
        return found

    jaxpr, consts = _compat.without_consts(jax.make_jaxpr(flat)(*leaves))
    outs = _compat.bind(step.primitive, [*consts, *leaves], {**step.params, "jaxpr": jaxpr})
    return out_tree.unflatten(outs)


def leafwise(step: Step, values: list[Any]) -> Outputs:
    """Primitives that return their operands: barriers, names and copies."""
    leaves, tree = _tree.flatten_fully(values)
    if step.primitive.multiple_results:
        return tree.unflatten(step.bind(leaves))
    return tree.unflatten([step.bind([leaf])[0] for leaf in leaves])


def varying(step: Step, values: list[Any]) -> Outputs:
    """Inside shard_map: marks a value as differing from device to device."""
    axes = frozenset().union(*(_compat.varying_axes(aval) for aval in step.out_avals))
    return [
        jax.tree_util.tree_map(lambda leaf: _compat.make_varying(leaf, axes), value)
        if is_implicit(value)
        else step.bind([value])[0]
        for value in values
    ]


RULES: dict[str, Rule] = {
    "by_platform": by_platform,
    "closed_call": inline,
    "cond": cond,
    "copy": leafwise,
    "copy_p": leafwise,
    "core_call": inline,
    "custom_jvp_call": custom_jvp,
    "custom_vjp_call": custom_vjp,
    "eval_jaxpr": inline,
    "jit": jit,
    "name": leafwise,
    "optimization_barrier": leafwise,
    "pvary": varying,
    "remat2": checkpoint,
    "scan": scan,
    "shard_map": shard_map,
    "while": while_loop,
}
