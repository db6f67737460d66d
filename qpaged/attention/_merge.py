"""Partial attention, over some of the slots that a query sees, and partials merged by their log-sum-exps.

The log-sum-exp of a partial is the natural logarithm of its total weight, the sum of exp(score) over its
slots. It says which share of the whole the partial's output has (Milakov and Gimelshein, 2018).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from qpaged._arguments import as_array, check_type, shown
from qpaged.arrays import dtype_of_floats


class Partial(NamedTuple):
    """Attention over some of the slots that queries see.

    Attributes:
        out: [tokens, q_heads, head_dim] float32, the softmax over these slots alone times their values; zeros
            where a query sees none of them.
        lse: [tokens, q_heads] float32, the log-sum-exp of the scores; -inf where a query sees none.
    """

    out: jax.Array
    lse: jax.Array

    @classmethod
    def of_sums(cls, acc: jax.Array, row_max: jax.Array, row_sum: jax.Array) -> Partial:
        """Return the partial of an online softmax: its weights are exp(score - row_max).

        Args:
            acc: [..., head_dim], the sum of the weighted values.
            row_max: [...], the highest score; anything finite where nothing is seen.
            row_sum: [...], the sum of the weights; 0 where nothing is seen.
        """
        is_seen = row_sum != 0  # also where the sum is NaN, which is to be seen
        total = jnp.where(is_seen, row_sum, 1)
        return cls(acc / total[..., None], jnp.where(is_seen, row_max + jnp.log(total), -jnp.inf))


def merge_attention(partials: Sequence[tuple[jax.Array, jax.Array]]) -> tuple[jax.Array, jax.Array]:
    """Return attention over all slots from attention over some at a time.

    For sequences whose pages lie on several devices (decoding that is parallel over the sequence), in several
    caches, or not all in pages.

    Args:
        partials: (out, lse) of each, as :func:`paged_attention` returns them with ``return_lse=True``: finite
            floats (tokens, q_heads, head_dim), and natural logarithms (tokens, q_heads). At least one. Each
            slot is in one of them alone, and so are the attention sinks.

    Returns:
        (out, lse) of all together in float32; zeros and -inf where a query sees nothing in any of them.

    Raises:
        TypeError, ValueError: no partials, or partials whose shapes do not fit.
    """
    check_type("partials", partials, Sequence, "a sequence of (out, lse)", "give a list of them")
    checked = [_checked_partial(index, partial) for index, partial in enumerate(partials)]
    if not checked:
        raise ValueError("partials must be at least one (out, lse), but there are none; give all of them.")
    shapes = {partial.out.shape for partial in checked}
    if len(shapes) > 1:
        raise ValueError(
            f"partials must be of the same queries, but have outputs of shapes {sorted(shapes)}; give "
            f"those of one step."
        )
    out, lse = merge(checked)  # as a plain tuple, which loops can carry
    return out, lse


def _checked_partial(index: int, partial: tuple[jax.Array, jax.Array]) -> Partial:
    name = f"partials[{index}]"
    if not isinstance(partial, tuple | list) or len(partial) != 2:
        raise TypeError(
            f"{name} must be (out, lse), but came as {shown(partial)}; give what paged_attention returns "
            f"with return_lse=True."
        )
    out, lse = (as_array(f"{name}[{part}]", array) for part, array in enumerate(partial))
    for part, array in enumerate((out, lse)):
        dtype_of_floats(f"{name}[{part}]", array.dtype)
    if out.ndim != 3 or lse.shape != out.shape[:-1]:
        raise ValueError(
            f"{name} must have shapes (tokens, q_heads, head_dim) and (tokens, q_heads), but came with "
            f"{out.shape} and {lse.shape}; give what paged_attention returns with return_lse=True."
        )
    return Partial(out.astype(jnp.float32), lse.astype(jnp.float32))


def merge(partials: Sequence[Partial]) -> Partial:
    """Return attention over all slots of the partials."""
    highest = _highest([partial.lse for partial in partials])
    weights = [jnp.exp(partial.lse - highest) for partial in partials]
    weighted = [weight[..., None] * partial.out for weight, partial in zip(weights, partials, strict=True)]
    return Partial.of_sums(functools.reduce(jnp.add, weighted), highest, functools.reduce(jnp.add, weights))


def merge_over(partial: Partial, axes: tuple[str, ...]) -> Partial:
    """Return attention over all slots from what each device along mesh axes has seen, within shard_map."""
    highest = lax.pmax(lax.stop_gradient(partial.lse), axes)
    highest = jnp.where(highest == -jnp.inf, 0, highest)
    weight = jnp.exp(partial.lse - highest)
    weighted, total = lax.psum((weight[..., None] * partial.out, weight), axes)
    return Partial.of_sums(weighted, highest, total)


def with_sinks(partial: Partial, sinks: jax.Array) -> Partial:
    """Return a partial with each head's sink (q_heads,): a score that carries no value."""
    highest = _highest([partial.lse, sinks])
    weight = jnp.exp(partial.lse - highest)
    return Partial.of_sums(weight[..., None] * partial.out, highest, weight + jnp.exp(sinks - highest))


def _highest(scores: Sequence[jax.Array]) -> jax.Array:
    """Return the highest of scores, or 0 where all are -inf, whose difference would be NaN."""
    highest = functools.reduce(jnp.maximum, scores)
    return lax.stop_gradient(jnp.where(highest == -jnp.inf, 0, highest))
