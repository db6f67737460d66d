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

Form: TypeAlias = str | tuple["Form", ...]
"""What is done to an output: nothing, its materialization, or one of these to each child of it."""
AS_IT_IS, DENSE = "as it is", "dense"


def cond(ctx: RuleContext, operands: list[Operand]) -> Outputs:
    """Evaluate a cond. What differs from branch to branch becomes dense: an output, or children of one."""
    index, operands = ctx.to_dense(operands[0]), operands[1:]
    branches = [_branch(ctx, jaxpr) for jaxpr in ctx.params["branches"]]
    # The branches are traced twice: first to see which outputs agree, then with the others dense.
    with _reports.no_reports():
        outs_of_branches = [jax.eval_shape(branch, *operands) for branch in branches]
    forms = [_common_form(outs) for outs in zip(*outs_of_branches, strict=True)]
    matching = [_in_forms(ctx, branch, forms) for branch in branches]
    platforms = ctx.params.get("branches_platforms")
    if platforms is not None:  # platform_dependent, whose index is not known before lowering
        return _platform_dependent(platforms, matching, operands)
    return jax.lax.switch(jnp.asarray(index, jnp.int32), matching, *operands)


def _branch(ctx: RuleContext, jaxpr: Jaxpr) -> Branch:
    def branch(*operands: Operand) -> list[Operand]:
        return ctx.evaluate(jaxpr, operands)

    return branch


def _in_forms(ctx: RuleContext, branch: Branch, forms: Sequence[Form]) -> Branch:
    def branch_in_forms(*operands: Operand) -> list[Operand]:
        outs = branch(*operands)
        return [_in_form(ctx, out, form) for out, form in zip(outs, forms, strict=True)]

    return branch_in_forms


def _common_form(outs: Sequence[Pytree]) -> Form:
    """Return what has to become dense so that the same output of all branches has one layout."""
    if not any(is_implicit(out) for out in outs) or all(_tree.same_layout(outs[0], out) for out in outs):
        return AS_IT_IS
    if not all(is_implicit(out) for out in outs):
        return DENSE
    children_of_outs, structures = zip(*map(_tree.flatten_one_layer, outs), strict=True)
    if any(structure != structures[0] for structure in structures):
        return DENSE
    columns = list(zip(*children_of_outs, strict=True))
    if not all(_have_same_type(column) for column in columns):
        return DENSE
    return tuple(map(_common_form, columns))


def _have_same_type(values: Sequence[Pytree]) -> bool:
    return len({(tuple(value.shape), value.dtype) for value in values}) == 1


def _in_form(ctx: RuleContext, value: Operand, form: Form) -> Operand:
    if form is AS_IT_IS:
        return value
    if form is DENSE:
        return ctx.to_dense(value)
    children, structure = _tree.flatten_one_layer(value)
    children = [_in_form(ctx, child, part) for child, part in zip(children, form, strict=True)]
    return _tree.unflatten_one_layer(structure, children)


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
