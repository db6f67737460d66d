"""Random weights for packages whose own start small, or at zero."""

from typing import TypeVar

import jax

Weights = TypeVar("Weights")


def random_weights(weights: Weights, scale: float) -> Weights:
    """Return weights as large as trained ones: matrices of standard deviation ``scale``, vectors as given."""
    leaves, tree = jax.tree.flatten(weights)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    randomized = [
        leaf if leaf.ndim < 2 else jax.random.normal(key, leaf.shape, leaf.dtype) * scale
        for key, leaf in zip(keys, leaves, strict=True)
    ]
    return jax.tree.unflatten(tree, randomized)
