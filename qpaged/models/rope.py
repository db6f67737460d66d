"""Rotary positions: how fast each pair of channels turns, and the turning (Su et al. 2021)."""

import math
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np


@dataclass(frozen=True)
class LinearScaling:
    """Positions divided by ``factor`` (Chen et al. 2023, "Extending Context Window ... via Positional
    Interpolation")."""

    factor: float
    amplitude = 1.0

    def __call__(self, frequencies: np.ndarray) -> np.ndarray:
        return frequencies / self.factor


@dataclass(frozen=True)
class Llama3Scaling:
    """Slow turns divided by ``factor``, fast ones kept, those between blended (Llama 3.1).

    A turn is slow where it takes more than original / low_freq_factor tokens, fast where fewer than
    original / high_freq_factor; the blend is linear in its turns within the original context.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int
    amplitude = 1.0

    def __post_init__(self) -> None:
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                "high_freq_factor must be greater than low_freq_factor, "
                f"but they came as {self.high_freq_factor} and {self.low_freq_factor}."
            )

    def __call__(self, frequencies: np.ndarray) -> np.ndarray:
        turns = self.original_max_position_embeddings * frequencies / (2 * math.pi)
        kept = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        kept = np.clip(kept, 0, 1)
        return frequencies * (kept + (1 - kept) / self.factor)


@dataclass(frozen=True)
class LongRopeScaling:
    """Each turn divided by its own factor, queries and keys longer by ``amplitude`` (Ding et al. 2024).

    There is one list of factors for sequences within the original context, and one for longer ones: a
    sequence is turned by one list from its first token to its last.

    Attributes:
        short_factor: (rotary_dim / 2,) within the original context.
        long_factor: likewise, beyond it.
        amplitude: factor of the turned queries and keys.
        original_max_position_embeddings: the longest sequence with the short factors.
        max_position_embeddings: that with the long ones.
        long: which of the two lists is in use.
    """

    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    amplitude: float
    original_max_position_embeddings: int
    max_position_embeddings: int
    long: bool = False

    def __call__(self, frequencies: np.ndarray) -> np.ndarray:
        return frequencies / np.asarray(self.long_factor if self.long else self.short_factor)


Scaling = LinearScaling | Llama3Scaling | LongRopeScaling


@dataclass(frozen=True)
class Rope:
    """Rotary positions of one kind of layer.

    Attributes:
        theta: base of the frequencies theta^(-2i / rotary_dim).
        partial_rotary_factor: the share of a head's channels, its first ones, that turn.
        scaling: what is done to the frequencies for longer contexts.
    """

    theta: float = 10000.0
    partial_rotary_factor: float = 1.0
    scaling: Scaling | None = None

    def rotary_dim(self, head_dim: int) -> int:
        """Channels of a head that turn."""
        return int(head_dim * self.partial_rotary_factor)

    def frequencies(self, head_dim: int) -> np.ndarray:
        """(rotary_dim / 2,) float32: radians that each pair turns per token."""
        dim = self.rotary_dim(head_dim)
        frequencies = self.theta ** -(np.arange(0, dim, 2) / dim)
        return (self.scaling(frequencies) if self.scaling else frequencies).astype(np.float32)


Rotation = tuple[jax.Array, jax.Array]
"""Cosine and sine of each token's angles, each (n, 1, rotary_dim / 2) float32."""


def rotary_angles(rope: Rope, head_dim: int, positions: jax.Array) -> Rotation:
    """The rotation of tokens at positions (n,) int32."""
    amplitude = rope.scaling.amplitude if rope.scaling else 1.0
    return _angles(jnp.asarray(rope.frequencies(head_dim)), jnp.float32(amplitude), positions)


@partial(jax.jit, inline=True)
def _angles(frequencies: jax.Array, amplitude: jax.Array, positions: jax.Array) -> Rotation:
    angles = positions.astype(jnp.float32)[:, None, None] * frequencies
    return amplitude * jnp.cos(angles), amplitude * jnp.sin(angles)


def rotate(heads: jax.Array, rotation: Rotation) -> jax.Array:
    """Turn the pairs (x[i], x[i + rotary_dim / 2]) of (n, heads, head_dim) by their position's angle.

    The half-split order in which Hugging Face stores weights; channels from rotary_dim on stay.
    """
    cos, sin = rotation
    half = cos.shape[-1]
    first, second, rest = jnp.split(heads.astype(jnp.float32), [half, 2 * half], axis=-1)
    turned = [first * cos - second * sin, second * cos + first * sin, rest]
    return jnp.concatenate(turned, axis=-1).astype(heads.dtype)
