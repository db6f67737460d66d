"""A mixture of experts: how many a layer has, and the router that weighs them for each token."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp


@dataclass(frozen=True)
class Experts:
    """The MLPs of a layer that has several, of which each token goes through a few (Shazeer et al. 2017).

    Attributes:
        num_experts: MLPs of a layer.
        num_experts_per_tok: those of them that a token goes through.
        norm_topk_prob: the weights of these are divided by their sum.

    Raises:
        ValueError: a token goes through none, or through more than there are.
    """

    num_experts: int
    num_experts_per_tok: int
    norm_topk_prob: bool

    def __post_init__(self) -> None:
        if not 1 <= self.num_experts_per_tok <= self.num_experts:
            raise ValueError(
                f"num_experts_per_tok must be from 1 to the number of experts, {self.num_experts}, "
                f"but came as {self.num_experts_per_tok}."
            )


def route(
    logits: jax.Array,  # [n, num_experts]
    experts: Experts,
) -> jax.Array:  # [n, num_experts] float32
    """Return the weight (n, num_experts) float32 of each expert for each token, from logits of any dtype.

    It is the softmax over all experts (Fedus et al. 2021, equation 1), with 0 for all but the largest.
    """
    probabilities = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
    largest, chosen = jax.lax.top_k(probabilities, experts.num_experts_per_tok)
    if experts.norm_topk_prob:
        largest /= largest.sum(axis=-1, keepdims=True)
    tokens = jnp.arange(len(logits))[:, None]
    return jnp.zeros_like(probabilities).at[tokens, chosen].set(largest)
