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

from qpaged._arguments import as_array


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
        partials: (out, lse) of each, as :func:`paged_attention` returns them with ``return_lse=True``:
            (tokens, q_heads, head_dim) and (tokens, q_heads). At least one. Each slot is in one of them
            alone, and so are the attention sinks.

    Returns:
        (out, lse) of all together in float32; zeros and -inf where a query sees nothing in any of them.

    Raises:
        TypeError, ValueError: no partials, or partials whose shapes do not fit.
    """
    checked = [_checked_partial(index, partial) for index, partial in enumerate(partials)]
    if not checked:
        raise ValueError("partials must be at least one (out, lse), but there are none; give all of them.")
    shapes = {partial.out.shape for partial in checked}
    if len(shapes) > 1:
        raise ValueError(
            f"partials must be of the same queries, but have outputs of shapes {sorted(shapes)}; give "
            f"those of one step."
        )
    return merge(checked)


def _checked_partial(index: int, partial: tuple[jax.Array, jax.Array]) -> Partial:
    try:
        out, lse = partial
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"partials[{index}] must be (out, lse), as paged_attention returns with return_lse=True, but is "
            f"a {type(partial).__name__}."
        ) from error
    out, lse = as_array(f"partials[{index}][0]", out), as_array(f"partials[{index}][1]", lse)
    if out.ndim == 0 or lse.shape != out.shape[:-1]:
        raise ValueError(
            f"partials[{index}] must be (tokens, q_heads, head_dim) and (tokens, q_heads), but has shapes "
            f"{out.shape} and {lse.shape}."
        )
    return Partial(out.astype(jnp.float32), lse.astype(jnp.float32))


def merge(partials: Sequence[Partial]) -> Partial:
    """Return attention over all slots of the partials."""
    highest = functools.reduce(jnp.maximum, [partial.lse for partial in partials])
    highest = lax.stop_gradient(jnp.where(highest == -jnp.inf, 0, highest))  # -inf - -inf would be NaN
    weights = [jnp.exp(partial.lse - highest) for partial in partials]
    weighted = [weight[..., None] * partial.out for weight, partial in zip(weights, partials, strict=True)]
    acc = functools.reduce(jnp.add, weighted)
    return Partial.of_sums(acc, highest, functools.reduce(jnp.add, weights))


def with_sinks(partial: Partial, sinks: jax.Array) -> Partial:
    """Return a partial with each head's sink (q_heads,): a score that carries no value."""
    of_sinks = Partial(jnp.zeros_like(partial.out), jnp.broadcast_to(sinks, partial.lse.shape))
    return merge([partial, of_sinks])
