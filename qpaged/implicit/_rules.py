"""Rules for primitives that call functions or return their operands, used if no handler is registered.

`RULES` lists every primitive with a rule of its own, here and in the modules next to this one.
"""

from __future__ import annotations

from typing import Any

import jax

from qpaged import _compat
from qpaged._compat import Operand
from qpaged.implicit import _tree
from qpaged.implicit._cond import cond
from qpaged.implicit._custom_derivatives import custom_jvp, custom_vjp
from qpaged.implicit._jit import jit
from qpaged.implicit._loops import scan, while_loop
from qpaged.implicit._rule_context import Outputs, Rule, RuleContext
from qpaged.implicit._shard_map import shard_map
from qpaged.implicit._value import is_implicit


def inline(ctx: RuleContext, operands: list[Operand]) -> Outputs:
    """Evaluate a call whose only meaning is its body."""
    return ctx.evaluate(_compat.called_jaxpr(ctx.params), operands)


def by_platform(ctx: RuleContext, operands: list[Operand]) -> Outputs:
    """Evaluate the default of `by_platform`, because kernels do not read implicit arrays."""
    return ctx.evaluate(ctx.params["default"], operands)


def checkpoint(ctx: RuleContext, operands: list[Operand]) -> Outputs:
    """Bind checkpoint again around the new body.

    Calling `jax.checkpoint` would lose parameters that only the equation has, such as `differentiated`.
    """
    leaves, tree = _tree.flatten_fully(operands)
    out_tree: Any = None

    def body(*inner_leaves: Operand) -> list[Operand]:
        nonlocal out_tree
        outs = ctx.evaluate(ctx.params["jaxpr"], tree.unflatten(inner_leaves))
        out_leaves, out_tree = _tree.flatten_fully(list(outs))
        return out_leaves

    jaxpr, consts = _compat.consts_as_inputs(jax.make_jaxpr(body)(*leaves))
    out_leaves = _compat.bind(ctx.primitive, [*consts, *leaves], {**ctx.params, "jaxpr": jaxpr})
    return out_tree.unflatten(out_leaves)


def leafwise(ctx: RuleContext, operands: list[Operand]) -> Outputs:
    """Apply a primitive that returns its operands, such as a barrier, a name or a copy, to every leaf."""
    leaves, tree = _tree.flatten_fully(operands)
    if ctx.primitive.multiple_results:
        return tree.unflatten(ctx.bind(leaves))
    return tree.unflatten([ctx.bind([leaf])[0] for leaf in leaves])


def convert_element_type(ctx: RuleContext, operands: list[Operand]) -> Outputs:
    """Return an operand that has the dtype already, as where a weak type becomes a strong one."""
    if ctx.params["new_dtype"] == operands[0].dtype and ctx.params.get("sharding") is None:
        return operands
    return NotImplemented


def stop_gradient(ctx: RuleContext, operands: list[Operand]) -> Outputs:
    """Stop the gradient at every leaf."""
    return jax.lax.stop_gradient(operands)


def pvary(ctx: RuleContext, operands: list[Operand]) -> Outputs:
    """Mark values inside shard_map, and the leaves of implicit ones, as varying from device to device."""
    axes = frozenset().union(*(_compat.varying_axes(aval) for aval in ctx.out_avals))

    def mark(leaf: jax.Array) -> jax.Array:
        return _compat.make_varying(leaf, axes)

    outs: list[Operand] = []
    for operand in operands:
        if is_implicit(operand):
            outs.append(jax.tree_util.tree_map(mark, operand))
        else:
            outs.extend(ctx.bind([operand]))
    return outs


# Keys are the names of primitives in jaxprs, which differ from those in jax.lax: "remat2" is checkpoint.
# Newer versions of JAX call "closed_call" and "core_call" "eval_jaxpr".
RULES: dict[str, Rule] = {
    "by_platform": by_platform,
    "closed_call": inline,
    "cond": cond,
    "convert_element_type": convert_element_type,
    "copy": leafwise,
    "copy_p": leafwise,
    "core_call": inline,
    "custom_jvp_call": custom_jvp,
    "custom_vjp_call": custom_vjp,
    "eval_jaxpr": inline,
    "jit": jit,
    "name": leafwise,
    "optimization_barrier": leafwise,
    "pvary": pvary,
    "remat2": checkpoint,
    "scan": scan,
    "shard_map": shard_map,
    "stop_gradient": stop_gradient,
    "while": while_loop,
}
