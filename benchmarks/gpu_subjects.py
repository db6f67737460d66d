"""What ``gpu_attention.py`` and ``gpu_peers.py`` share: the inputs, and a timed decode step over them."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from shapes import Shape

CALLS = 20  # steps that a round launches one after another


@dataclass
class Inputs:
    """The queries, keys and values that everything attends to: bfloat16, on the device."""

    shape: Shape
    query: jax.Array  # [sequences, q_heads, head_dim]
    keys: list[jax.Array]  # for each sequence [kv_heads, length, head_dim]
    values: list[jax.Array]

    @classmethod
    def random(cls, shape: Shape) -> "Inputs":
        """Draw Gaussian inputs of a shape."""
        query = gaussian(0, len(shape.lengths), shape.q_heads, shape.head_dim)
        keys = []
        values = []
        for row, length in enumerate(shape.lengths):
            keys.append(gaussian(2 * row + 1, shape.kv_heads, length, shape.head_dim))
            values.append(gaussian(2 * row + 2, shape.kv_heads, length, shape.head_dim))
        return cls(shape, query, keys, values)

    def exact_attention(self) -> np.ndarray:
        """Return attention over the inputs in float32, [sequences, q_heads, head_dim]."""
        rows = zip(self.query, self.keys, self.values, strict=True)
        return np.stack([float32_attention(query, keys, values) for query, keys, values in rows])


def gaussian(seed: int, *shape: int) -> jax.Array:
    """Return Gaussian bfloat16 values."""
    return jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16)


@jax.jit
def float32_attention(
    query: jax.Array,  # [q_heads, head_dim]
    keys: jax.Array,  # [kv_heads, length, head_dim]
    values: jax.Array,
) -> jax.Array:
    """Return the attention of one sequence's newest token in float32, [q_heads, head_dim]."""
    grouped = query.astype(jnp.float32).reshape(len(keys), -1, query.shape[-1])
    # "highest", since float32 dots on a GPU are rounded to TF32 otherwise.
    scores = jnp.einsum("hgd,hsd->hgs", grouped, keys.astype(jnp.float32), precision="highest")
    weights = jax.nn.softmax(scores * query.shape[-1] ** -0.5)
    out = jnp.einsum("hgs,hsd->hgd", weights, values.astype(jnp.float32), precision="highest")
    return out.reshape(query.shape)


@dataclass
class Subject:
    """One implementation of the decode step, ready to be timed.

    Attributes:
        name: its name in the results, with its format.
        step: launches one decode step and returns its output on the device.
        wait: returns once every launched step is done.
        bytes_read: bytes that a step must read.
        bits: bits per element.
        paged: True if it reads pages through a table.
        launch_round: launches ``CALLS`` steps at once, where there is a faster way than calling ``step``.
        times: milliseconds of a step, one for each round.
    """

    name: str
    step: Callable[[], Any]
    wait: Callable[[Any], Any]
    bytes_read: float
    bits: int
    paged: bool = True
    launch_round: Callable[[], Any] | None = None
    times: list[float] = field(default_factory=list)

    def time_round(self) -> float:
        """Run a round and return the milliseconds of one of its steps."""
        begin = time.perf_counter()
        if self.launch_round is not None:
            out = self.launch_round()
        else:
            for _ in range(CALLS):
                out = self.step()
        self.wait(out)
        return (time.perf_counter() - begin) / CALLS * 1e3


Candidates = Iterator[tuple[str, Callable[[], Subject]]]
"""Names, each with a function that builds the subject, or raises if this machine cannot run it."""
