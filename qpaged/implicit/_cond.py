"""The rule for cond, switch and platform_dependent, whose branches may return different kinds of array."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import jax
import jax.numpy as jnp

from qpaged._compat import Jaxpr, Operand, Pytree
from qpaged.implicit import _reports, _tree
from qpaged.implicit._rule_context import Outputs, RuleContext
from qpaged.implicit._value import is_implicit

Branch: TypeAlias = Callable[..., list[Operand]]


def cond(ctx: RuleContext, operands: list[Operand]) -> Outputs:
    """Evaluate a cond. An output stays implicit only if all branches return it in the same layout."""
    index, operands = ctx.to_dense(operands[0]), operands[1:]
    branches = [_branch(ctx, jaxpr) for jaxpr in ctx.params["branches"]]
    # The branches are traced twice: first to see which outputs agree, then with the others dense.
    with _reports.no_reports():
        outs_of_branches = [jax.eval_shape(branch, *operands) for branch in branches]
    same_in_all = [_have_same_layout(outs) for outs in zip(*outs_of_branches, strict=True)]
    matching = [_with_differing_outputs_dense(ctx, branch, same_in_all) for branch in branches]
    platforms = ctx.params.get("branches_platforms")
    if platforms is not None:  # platform_dependent, whose index is not known before lowering
        return _platform_dependent(platforms, matching, operands)
    return jax.lax.switch(jnp.asarray(index, jnp.int32), matching, *operands)


def _branch(ctx: RuleContext, jaxpr: Jaxpr) -> Branch:
    def branch(*operands: Operand) -> list[Operand]:
        return ctx.evaluate(jaxpr, operands)

    return branch


def _with_differing_outputs_dense(ctx: RuleContext, branch: Branch, same_in_all: list[bool]) -> Branch:
    def matching_branch(*operands: Operand) -> list[Operand]:
        outs = branch(*operands)
        return [out if same else ctx.to_dense(out) for out, same in zip(outs, same_in_all, strict=True)]

    return matching_branch


def _have_same_layout(outs: Sequence[Pytree]) -> bool:
    if not any(is_implicit(out) for out in outs):
        return True
    return all(_tree.same_layout(outs[0], out) for out in outs[1:])


def _platform_dependent(
    platforms: Sequence[tuple[str, ...] | None], branches: list[Branch], operands: list[Operand]
) -> Outputs:
    """Rebuild `jax.lax.platform_dependent` from the platforms that a cond holds for each of its branches."""
    default: Branch | None = None
    per_platform: dict[str, Branch] = {}
    for names, branch in zip(platforms, branches, strict=True):
        if names is None:
            default = branch
        else:
            per_platform.update(dict.fromkeys(names, branch))
    return jax.lax.platform_dependent(*operands, default=default, **per_platform)
