"""cond, switch and platform_dependent, whose branches may return different kinds of array."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from qpaged.implicit import _notes, _tree
from qpaged.implicit._step import Outputs, Step
from qpaged.implicit._value import is_implicit

Branch = Callable[..., list[Any]]


def cond(step: Step, values: list[Any]) -> Outputs:
    """An output stays implicit where all branches return it in the same form; elsewhere all make it dense."""
    index, operands = step.dense(values[0]), values[1:]
    raw = [_branch(step, jaxpr) for jaxpr in step.params["branches"]]
    with _notes.silence():
        outcomes = [jax.eval_shape(branch, *operands) for branch in raw]
    keep = [_alike(forms) for forms in zip(*outcomes, strict=True)]
    branches = [_with_dense(step, branch, keep) for branch in raw]
    platforms = step.params.get("branches_platforms")
    if platforms is not None:
        return _by_platform(platforms, branches, operands)
    return jax.lax.switch(jnp.asarray(index, jnp.int32), branches, *operands)


def _branch(step: Step, jaxpr: Any) -> Branch:
    return lambda *operands: step.evaluate(jaxpr, operands)


def _with_dense(step: Step, branch: Branch, keep: list[bool]) -> Branch:
    def matched(*operands: Any) -> list[Any]:
        outs = branch(*operands)
        return [out if same else step.dense(out) for out, same in zip(outs, keep, strict=True)]

    return matched


def _alike(forms: tuple[Any, ...]) -> bool:
    if not any(is_implicit(form) for form in forms):
        return True
    return all(_tree.same_layout(forms[0], form) for form in forms[1:])


def _by_platform(platforms: Any, branches: list[Branch], operands: list[Any]) -> Outputs:
    named = {p: branch for names, branch in zip(platforms, branches, strict=True) for p in names or ()}
    default = next((b for names, b in zip(platforms, branches, strict=True) if names is None), None)
    return jax.lax.platform_dependent(*operands, default=default, **named)
