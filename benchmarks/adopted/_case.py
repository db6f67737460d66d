"""The description of a model that is to be measured."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

PADDING = 0

Pytree = Any
Step = Callable[[Pytree, jax.Array, jax.Array, Pytree], tuple[jax.Array, Pytree]]


@dataclass(frozen=True)
class Case:
    """A model of some package, as a step over its own cache.

    Attributes:
        name: the package and the model: "transformers Llama".
        packages: the distributions whose versions the results record.
        step: ``step(params, tokens, position, cache) -> (logits, cache)``, the package's own code. Tokens are
            int32 [batch, count], a whole prompt or one token each; the first is at ``position``, a scalar
            int32. Logits are [batch, count, vocabulary], or [batch, 1, vocabulary] for the last token alone.
        params: the weights.
        cache: ``cache(batch, length)`` makes an empty float cache.
        vocabulary: the number of tokens.
        pads: True if the step masks PADDING tokens at the beginning of a prompt, in later steps, too.
        prompt: tokens of a text from which prompts are cut, for a model with trained weights.
        mesh: the mesh that the package's callers set, or None.
    """

    name: str
    packages: tuple[str, ...]
    step: Step
    params: Pytree
    cache: Callable[[int, int], Pytree]
    vocabulary: int
    pads: bool = False
    prompt: np.ndarray | None = None
    mesh: jax.sharding.Mesh | None = None
