"""What a model must say to be measured."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax

PADDING = 0


@dataclass(frozen=True)
class Case:
    """A model of some package, as a step over its own cache.

    Attributes:
        name: of the model, with its package: "transformers Llama".
        packages: the distributions whose versions matter.
        step: ``step(params, tokens, position, cache) -> (logits, cache)``: the package's own code for tokens
            (batch, count) int32, the first of which is at ``position``, a scalar int32; it serves a prompt of
            many tokens and a single one. Logits are (batch, count, vocabulary).
        params: the weights.
        cache: ``cache(batch, length)``: an unwritten float cache.
        vocabulary: tokens are below it.
        pads: whether the step masks tokens that are PADDING, in the prompt's beginning, for good.
        prompt: text of which prompts are cut, as tokens, for a model with trained weights.
    """

    name: str
    packages: tuple[str, ...]
    step: Callable[[Any, jax.Array, jax.Array, Any], tuple[jax.Array, Any]]
    params: Any
    cache: Callable[[int, int], Any]
    vocabulary: int
    pads: bool = False
    prompt: Any = None
