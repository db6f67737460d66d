"""What ``cpu_attention.py`` and ``cpu_peers.py`` share: the inputs, and a timed step over them."""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field

import jax.numpy as jnp
import numpy as np
from shapes import Shape

THREADS = len(os.sched_getaffinity(0))


@dataclass
class Inputs:
    """The queries, keys and values that everything attends to: float32 that bfloat16 holds exactly."""

    shape: Shape
    query: np.ndarray  # [tokens, q_heads, head_dim]
    keys: list[np.ndarray]  # for each sequence [kv_heads, length, head_dim]
    values: list[np.ndarray]

    @classmethod
    def random(cls, shape: Shape) -> "Inputs":
        """Draw Gaussian inputs of a shape."""
        query = gaussian(0, shape.tokens, shape.q_heads, shape.head_dim)
        keys = []
        values = []
        for row, length in enumerate(shape.lengths):
            keys.append(gaussian(2 * row + 1, shape.kv_heads, length, shape.head_dim))
            values.append(gaussian(2 * row + 2, shape.kv_heads, length, shape.head_dim))
        return cls(shape, query, keys, values)

    def exact_attention(self) -> np.ndarray:
        """Return attention over the inputs in float64, [tokens, q_heads, head_dim]."""
        chunk = self.shape.chunk
        outs = []
        for row, length in enumerate(self.shape.lengths):
            keys = self.keys[row].astype(np.float64)
            values = self.values[row].astype(np.float64)
            for index, query in enumerate(self.query[row * chunk : (row + 1) * chunk]):
                visible = length - chunk + index + 1  # attention is causal within the chunk
                outs.append(float64_attention(query, keys[:, :visible], values[:, :visible]))
        return np.stack(outs)


def gaussian(seed: int, *shape: int) -> np.ndarray:
    """Return Gaussian values, rounded to bfloat16 so that every dtype gets the same ones."""
    values = np.random.default_rng(seed).standard_normal(shape, np.float32)
    return np.asarray(jnp.asarray(values, jnp.bfloat16), np.float32)


def float64_attention(query: np.ndarray, keys: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Return attention of one token [q_heads, head_dim] to all of [kv_heads, length, head_dim]."""
    kv_heads, _, head_dim = keys.shape
    grouped = query.reshape(kv_heads, -1, head_dim).astype(np.float64)
    scores = grouped @ keys.swapaxes(1, 2) * head_dim**-0.5
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    out = weights / weights.sum(axis=-1, keepdims=True) @ values
    return out.reshape(query.shape)


@dataclass
class Subject:
    """One implementation of the step, ready to be timed.

    Attributes:
        name: its name in the results, with its format.
        step: runs the step to its end and returns its output.
        bytes_read: bytes that the step must read.
        times: milliseconds of the step, one for each round.
    """

    name: str
    step: Callable[[], np.ndarray]
    bytes_read: float
    times: list[float] = field(default_factory=list)


def print_missing(package: str) -> None:
    """Tell that a peer is left out."""
    print(f"left out: {package} is not installed", file=sys.stderr)
