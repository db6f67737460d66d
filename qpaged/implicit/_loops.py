"""Loops that carry, close over, and run through implicit arrays."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax

from qpaged import _compat
from qpaged.implicit import _notes, _tree
from qpaged.implicit._step import Outputs, Step
from qpaged.implicit._value import is_implicit

Outcome = Callable[[Sequence[Any]], list[Any]]  # carries to the carries after one turn


def scan(step: Step, values: list[Any]) -> Outputs:
    """Carries stay implicit where the body keeps their structure; xs are sliced leaf by leaf."""
    jaxpr, length = step.params["jaxpr"], step.params["length"]
    n_consts, n_carry = _compat.scan_counts(step.params, len(values))
    consts, init, xs = _split(values, n_consts, n_carry)
    x_avals = step_avals(jaxpr)[n_consts + n_carry :]
    xs = [
        x if _sliceable(x, length, aval, step) else step.dense(x) for x, aval in zip(xs, x_avals, strict=True)
    ]

    def body(carry: Sequence[Any], x: Sequence[Any]) -> tuple[list[Any], list[Any]]:
        outs = step.evaluate(jaxpr, [*consts, *carry, *x])
        return outs[:n_carry], outs[n_carry:]

    first_x = [jax.eval_shape(_first, x) for x in xs]
    init, settle = settled(step, init, lambda carry: jax.eval_shape(body, carry, first_x)[0])
    carry, ys = jax.lax.scan(
        lambda carry, x: (settle((turn := body(carry, x))[0]), turn[1]),
        init,
        xs,
        length=length,
        reverse=step.params["reverse"],
        unroll=step.params["unroll"],
    )
    return [*carry, *ys]


def while_loop(step: Step, values: list[Any]) -> Outputs:
    """Carries as in scan; the constants of the condition and of the body are closed over."""
    n_cond, n_body = step.params["cond_nconsts"], step.params["body_nconsts"]
    cond_consts, body_consts, init = _split(values, n_cond, n_body)

    def condition(carry: Sequence[Any]) -> Any:
        (more,) = step.evaluate(step.params["cond_jaxpr"], [*cond_consts, *carry])
        return step.dense(more)

    def body(carry: Sequence[Any]) -> list[Any]:
        return step.evaluate(step.params["body_jaxpr"], [*body_consts, *carry])

    init, settle = settled(step, init, lambda carry: jax.eval_shape(body, carry))
    return jax.lax.while_loop(condition, lambda carry: settle(body(carry)), init)


def step_avals(jaxpr: Any) -> list[Any]:
    """What a jaxpr's inputs are, seen from inside."""
    return [var.aval for var in _compat.jaxpr_and_consts(jaxpr)[0].invars]


def settled(step: Step, init: list[Any], outcome: Outcome) -> tuple[list[Any], Outcome]:
    """Make carries that a turn of the loop returns as they were: implicit where possible, else dense.

    A carry whose structure or leaf shapes a turn changes is materialized on both sides. That may
    change what becomes of the others, so it goes on until nothing changes; there are finitely many.

    Returns:
        The initial carries, and the function to put around the body's carries.
    """
    if any(is_implicit(value) for value in init):
        while True:
            with _notes.silence():  # only what the loop finally does is worth a warning
                after = outcome(init)
            moved = [
                is_implicit(value) and not _tree.same_layout(jax.eval_shape(lambda v: v, value), out)
                for value, out in zip(init, after, strict=True)
            ]
            if not any(moved):
                break
            init = [step.dense(value) if change else value for value, change in zip(init, moved, strict=True)]
        init = [_as_varying(value, out) for value, out in zip(init, after, strict=True)]
    kept = [is_implicit(value) for value in init]

    def settle(carry: Sequence[Any]) -> list[Any]:
        return [value if keep else step.dense(value) for value, keep in zip(carry, kept, strict=True)]

    return init, settle


def _as_varying(value: Any, out: Any) -> Any:
    """Inside shard_map, leaves of an implicit carry vary over the axes that the body makes them vary over."""
    if not is_implicit(value):
        return value
    return jax.tree_util.tree_map(
        lambda leaf, after: _compat.make_varying(leaf, _compat.varying_axes(after)), value, out
    )


def _sliceable(x: Any, length: int, aval: Any, step: Step) -> bool:
    """Whether taking one slice of every leaf takes one slice of the array.

    Shapes are all there is to tell by: a slice must have the shape of a slice, and one more slice must
    make the array longer by one. In A @ B.T with a square result the first holds and the second does not.
    """
    if not is_implicit(x):
        return True
    if any(leaf.shape[:1] != (length,) for leaf in jax.tree_util.tree_leaves(x)):
        return False
    longer = jax.tree_util.tree_map(
        lambda leaf: jax.ShapeDtypeStruct((length + 1, *leaf.shape[1:]), leaf.dtype), x
    )
    one_more = jax.ShapeDtypeStruct((length + 1, *aval.shape), aval.dtype)
    return fits(jax.eval_shape(_first, x), aval, step) and fits(longer, one_more, step)


def fits(part: Any, aval: Any, step: Step) -> bool:
    """Whether an implicit array whose leaves were cut up still materializes to `aval`."""
    try:
        with _notes.silence():
            struct = jax.eval_shape(step.materialize, _tree.restated(part, aval.shape, aval.dtype))
    except Exception:  # whatever a class raises: its leaves do not go together any more
        return False
    return struct.shape == aval.shape


def _first(x: Any) -> Any:
    return jax.tree_util.tree_map(lambda leaf: leaf[0], x)


def _split(values: list[Any], first: int, second: int) -> tuple[list[Any], list[Any], list[Any]]:
    return values[:first], values[first : first + second], values[first + second :]
