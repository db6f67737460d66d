"""Attention over parts of what a query sees, and the parts merged by their log-sum-exps.

The log-sum-exp of a part is the natural logarithm of its total weight, the sum of exp(score) over its slots.
It says which share of the whole the part's output has (Milakov and Gimelshein, 2018).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from qpaged._arguments import as_array


class Part(NamedTuple):
    """Attention over a part of what queries see.

    Attributes:
        out: [tokens, q_heads, head_dim] float32, the softmax over the part alone times its values; zeros
            where a query sees nothing of it.
        lse: [tokens, q_heads] float32, the log-sum-exp of the part's scores; -inf where a query sees nothing.
    """

    out: jax.Array
    lse: jax.Array

    @classmethod
    def of_sums(cls, acc: jax.Array, row_max: jax.Array, row_sum: jax.Array) -> Part:
        """Return the part whose weights exp(score - row_max) add up to ``row_sum``, times values to ``acc``.

        Args:
            acc: [..., head_dim].
            row_max: [...], the highest score; anything finite where nothing is seen.
            row_sum: [...], 0 where nothing is seen.
        """
        is_seen = row_sum != 0  # also where the sum is NaN, which is to be seen
        total = jnp.where(is_seen, row_sum, 1)
        return cls(acc / total[..., None], jnp.where(is_seen, row_max + jnp.log(total), -jnp.inf))


def merge_attention(parts: Sequence[tuple[jax.Array, jax.Array]]) -> tuple[jax.Array, jax.Array]:
    """Return attention over all of the parts, from attention over each: for sequences that lie in parts.

    The parts may be on several devices, as in decoding parallel over the sequence: gather them first.

    Args:
        parts: (out, lse) of each, as :func:`paged_attention` returns them with ``return_lse=True``: (tokens,
            q_heads, head_dim) and (tokens, q_heads). At least one; no slot may be in two. Attention sinks
            are given with one part alone.

    Returns:
        (out, lse) of all together in float32; zeros and -inf where a query sees nothing in any part.

    Raises:
        TypeError, ValueError: no parts, or parts whose shapes do not fit.
    """
    checked = [_checked_part(index, part) for index, part in enumerate(parts)]
    if not checked:
        raise ValueError("parts must be at least one (out, lse), but there are none.")
    shapes = {part.out.shape for part in checked}
    if len(shapes) > 1:
        raise ValueError(f"parts must be of the same queries, but have outputs of shapes {sorted(shapes)}.")
    return merge(checked)


def _checked_part(index: int, part: tuple[jax.Array, jax.Array]) -> Part:
    try:
        out, lse = part
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"parts[{index}] must be (out, lse), as paged_attention returns with return_lse=True, but is "
            f"a {type(part).__name__}."
        ) from error
    out, lse = as_array(f"parts[{index}][0]", out), as_array(f"parts[{index}][1]", lse)
    if out.ndim == 0 or lse.shape != out.shape[:-1]:
        raise ValueError(
            f"parts[{index}] must be (tokens, q_heads, head_dim) and (tokens, q_heads), but has shapes "
            f"{out.shape} and {lse.shape}."
        )
    return Part(out.astype(jnp.float32), lse.astype(jnp.float32))


def merge(parts: Sequence[Part]) -> Part:
    """Return attention over all of the parts."""
    highest = functools.reduce(jnp.maximum, [part.lse for part in parts])
    highest = lax.stop_gradient(jnp.where(highest == -jnp.inf, 0, highest))  # -inf - -inf would be NaN
    weights = [jnp.exp(part.lse - highest) for part in parts]
    acc = functools.reduce(jnp.add, [w[..., None] * part.out for w, part in zip(weights, parts, strict=True)])
    return Part.of_sums(acc, highest, functools.reduce(jnp.add, weights))


def with_sinks(part: Part, sinks: jax.Array) -> Part:
    """Return a part to which each head's sink (q_heads,) was added: a score that carries no value."""
    return merge([part, Part(jnp.zeros_like(part.out), jnp.broadcast_to(sinks, part.lse.shape))])
