"""Rules for scan and while: loops that carry, close over, and scan through implicit arrays."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import jax
import jax.numpy as jnp

from qpaged import _compat
from qpaged._compat import Aval, Operand, Pytree
from qpaged.implicit import _reports, _tree
from qpaged.implicit._rule_context import Outputs, RuleContext
from qpaged.implicit._value import ImplicitValue, is_implicit

Carry: TypeAlias = Sequence[Operand]


def scan(ctx: RuleContext, operands: list[Operand]) -> Outputs:
    """Evaluate a scan. Carries stay implicit if the body keeps their layout; xs are sliced leaf by leaf."""
    jaxpr, length = ctx.params["jaxpr"], ctx.params["length"]
    n_consts, n_carry = _compat.scan_counts(ctx.params, len(operands))
    consts, init, xs = _split(operands, n_consts, n_carry)
    x_avals = jaxpr.in_avals[n_consts + n_carry :]
    xs = [_sliceable_or_dense(ctx, x, aval, length) for x, aval in zip(xs, x_avals, strict=True)]

    def body(carry: Carry, x: Sequence[Operand]) -> tuple[list[Operand], list[Operand]]:
        outs = ctx.evaluate(jaxpr, [*consts, *carry, *x])
        return outs[:n_carry], outs[n_carry:]

    one_x = [jax.eval_shape(_one_slice, x) for x in xs]

    def carry_after_iteration(carry: Carry) -> Carry:
        carry, _ = jax.eval_shape(body, carry, one_x)
        return carry

    def run(init: list[Operand], xs: Sequence[Operand], length: int) -> tuple[list[Operand], list[Operand]]:
        init = _stable_init(ctx, init, carry_after_iteration)
        stays_implicit = [is_implicit(value) for value in init]

        def stable_body(carry: Carry, x: Sequence[Operand]) -> tuple[list[Operand], list[Operand]]:
            carry, ys = body(carry, x)
            return _with_others_dense(ctx, carry, stays_implicit), ys

        return jax.lax.scan(
            stable_body, init, xs, length=length, reverse=ctx.params["reverse"], unroll=ctx.params["unroll"]
        )

    outside = _iteration_outside(init, carry_after_iteration) if length else None
    if outside is None:
        carry, ys = run(init, xs, length)
        return [*carry, *ys]
    at_front = (outside == FIRST) != ctx.params["reverse"]
    x, other_xs = _one_and_others(xs, at_front)
    if outside == FIRST:
        carry, ys = body(init, x)
        carry, other_ys = run(carry, other_xs, length - 1)
    else:
        carry, other_ys = run(init, other_xs, length - 1)
        carry, ys = body(carry, x)
    joined = [_joined(ctx, y, others, at_front) for y, others in zip(ys, other_ys, strict=True)]
    return [*carry, *joined]


def while_loop(ctx: RuleContext, operands: list[Operand]) -> Outputs:
    """Evaluate a while loop. Carries stay implicit as in scan; constants are closed over."""
    n_cond, n_body = ctx.params["cond_nconsts"], ctx.params["body_nconsts"]
    cond_consts, body_consts, init = _split(operands, n_cond, n_body)

    def condition(carry: Carry) -> Operand:
        (predicate,) = ctx.evaluate(ctx.params["cond_jaxpr"], [*cond_consts, *carry])
        return ctx.to_dense(predicate)

    def body(carry: Carry) -> list[Operand]:
        return ctx.evaluate(ctx.params["body_jaxpr"], [*body_consts, *carry])

    def carry_after_iteration(carry: Carry) -> Carry:
        return jax.eval_shape(body, carry)

    init = _stable_init(ctx, init, carry_after_iteration)
    stays_implicit = [is_implicit(value) for value in init]

    def stable_body(carry: Carry) -> list[Operand]:
        return _with_others_dense(ctx, body(carry), stays_implicit)

    return jax.lax.while_loop(condition, stable_body, init)


def _split(operands: list[Operand], first: int, second: int) -> tuple[list[Operand], ...]:
    return operands[:first], operands[first : first + second], operands[first + second :]


# Carries: their structure and types must be the same before and after an iteration.


def _stable_init(
    ctx: RuleContext, init: list[Operand], carry_after_iteration: Callable[[Carry], Carry]
) -> list[Operand]:
    """Materialize the initial carries whose structure or leaf shapes one iteration would change.

    A materialized carry may change what the body makes of the others, so this repeats until nothing
    changes. It ends, because every round materializes a carry.
    """
    if not any(is_implicit(value) for value in init):
        return init
    while True:
        with _reports.no_reports():  # only what the loop finally does is worth a warning
            after = carry_after_iteration(init)
        changes = [_changes_layout(value, out) for value, out in zip(init, after, strict=True)]
        if not any(changes):
            break
        init = [ctx.to_dense(value) if change else value for value, change in zip(init, changes, strict=True)]
    return [_varying_like(value, out) for value, out in zip(init, after, strict=True)]


FIRST, LAST = "first", "last"


def _iteration_outside(init: Carry, carry_after_iteration: Callable[[Carry], Carry]) -> str | None:
    """Return the iteration to take out of a scan that makes dense carries implicit; None if it makes none so.

    The first, if the others keep what it returns; then no iteration materializes it. Otherwise the last: the
    others get a dense carry, as the first does, and the scan returns an implicit one.
    """
    with _reports.no_reports():
        after = carry_after_iteration(init)
        new = [is_implicit(out) and not is_implicit(value) for value, out in zip(init, after, strict=True)]
        if not any(new):
            return None
        after_two = carry_after_iteration(after)
    for is_new, one, two in zip(new, after, after_two, strict=True):
        if is_new and not _tree.same_layout(one, two):
            return LAST
    return FIRST


def _one_and_others(xs: Sequence[Operand], at_front: bool) -> tuple[list[Pytree], list[Pytree]]:
    """Return the slice of xs at the front, or at the back, and the others."""
    index, others = (0, slice(1, None)) if at_front else (-1, slice(None, -1))
    return (
        [jax.tree_util.tree_map(lambda leaf: leaf[index], x) for x in xs],
        [jax.tree_util.tree_map(lambda leaf: leaf[others], x) for x in xs],
    )


def _joined(ctx: RuleContext, y: Operand, others: Operand, at_front: bool) -> Operand:
    """Return the ys of all iterations from that of the one outside and the stacked ones of the others."""
    if not _tree.same_structure(y, others):
        y, others = ctx.to_dense(y), jax.vmap(ctx.to_dense)(others)

    def join(leaf: jax.Array, other_leaves: jax.Array) -> jax.Array:
        parts = (leaf[None], other_leaves) if at_front else (other_leaves, leaf[None])
        return jnp.concatenate(parts)

    return jax.tree_util.tree_map(join, y, others)


def _changes_layout(value: Operand, out: Pytree) -> bool:
    if not is_implicit(value):
        return False
    # Leaves may be Python numbers, which have a shape and a dtype only as abstract values.
    return not _tree.same_layout(jax.eval_shape(lambda v: v, value), out)


def _varying_like(value: Operand, out: Pytree) -> Operand:
    """Mark the leaves of an implicit carry as varying along the same mesh axes as after one iteration.

    Inside shard_map, JAX requires a carry to vary along the same axes before and after an iteration.
    """
    if not is_implicit(value):
        return value

    def mark(leaf: jax.Array, leaf_out: jax.ShapeDtypeStruct) -> jax.Array:
        return _compat.make_varying(leaf, _compat.varying_axes(leaf_out))

    return jax.tree_util.tree_map(mark, value, out)


def _with_others_dense(ctx: RuleContext, carry: Carry, stays_implicit: list[bool]) -> list[Operand]:
    return [
        value if stays else ctx.to_dense(value) for value, stays in zip(carry, stays_implicit, strict=True)
    ]


# Slicing leaf by leaf.


def _sliceable_or_dense(ctx: RuleContext, x: Operand, slice_aval: Aval, length: int) -> Operand:
    if not is_implicit(x) or _is_sliceable(ctx, x, slice_aval, length):
        return x
    return ctx.to_dense(x)


def _is_sliceable(ctx: RuleContext, x: ImplicitValue, slice_aval: Aval, length: int) -> bool:
    """Return True if taking one slice of every leaf takes one slice of the array.

    Only shapes can tell: a slice must have the shape of a slice, and one more slice must make the array
    longer by one. In A @ B.T with a square result the first holds and the second does not.
    """
    if any(leaf.shape[:1] != (length,) for leaf in jax.tree_util.tree_leaves(x)):
        return False

    def one_longer(leaf: jax.Array) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((length + 1, *leaf.shape[1:]), leaf.dtype)

    longer = jax.tree_util.tree_map(one_longer, x)
    longer_aval = jax.ShapeDtypeStruct((length + 1, *slice_aval.shape), slice_aval.dtype)
    one_slice = jax.eval_shape(_one_slice, x)
    return ctx.materializes_to(one_slice, slice_aval) and ctx.materializes_to(longer, longer_aval)


def _one_slice(x: Pytree) -> Pytree:
    """Return the first slice of every leaf; zeros of its shape if the loop takes no steps."""

    def first(leaf: jax.Array) -> jax.Array:
        if leaf.shape[0] == 0:
            return jnp.zeros_like(leaf, shape=leaf.shape[1:])
        return leaf[0]

    return jax.tree_util.tree_map(first, x)
