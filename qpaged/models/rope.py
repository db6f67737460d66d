"""Rotary position embeddings: the frequency of each pair of channels, and the rotation (Su et al. 2021)."""

import math
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np


@dataclass(frozen=True)
class LinearScaling:
    """Divides all frequencies, and so positions, by ``factor``.

    Chen et al. 2023, "Extending Context Window of Large Language Models via Positional Interpolation".
    """

    factor: float
    amplitude = 1.0

    def __call__(self, frequencies: np.ndarray) -> np.ndarray:
        return frequencies / self.factor


@dataclass(frozen=True)
class Llama3Scaling:
    """Divides low frequencies by ``factor``, keeps high ones, and blends those between (Llama 3.1).

    A frequency is low if a turn takes more than original / low_freq_factor tokens, high if it takes fewer
    than original / high_freq_factor; the blend is linear in the number of turns within the original context.
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
        blend = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        blend = np.clip(blend, 0, 1)  # 1 for frequencies that are kept
        return frequencies * (blend + (1 - blend) / self.factor)


@dataclass(frozen=True)
class LongRopeScaling:
    """Divides each frequency by a factor of its own (Ding et al. 2024).

    There is one list of factors for sequences within the original context, and one for longer ones. A
    sequence is rotated by one of them from its first token to its last.

    Attributes:
        short_factor: (rotary_dim / 2,) factors for sequences within the original context.
        long_factor: (rotary_dim / 2,) factors for longer sequences.
        amplitude: factor of the rotated queries and keys.
        original_max_position_embeddings: length of the longest sequence with the short factors.
        max_position_embeddings: length of the longest sequence with the long factors.
        long: True if the long factors are in use.
    """

    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    amplitude: float
    original_max_position_embeddings: int
    max_position_embeddings: int
    long: bool = False

    def __call__(self, frequencies: np.ndarray) -> np.ndarray:
        factors = self.long_factor if self.long else self.short_factor
        return frequencies / np.asarray(factors)


@dataclass(frozen=True)
class YarnScaling:
    """Divides low frequencies by ``factor``, keeps high ones, and blends those between (Peng et al. 2023).

    The blend is linear in the pair's index, between the pairs that turn ``beta_fast`` and ``beta_slow`` times
    within the original context.

    Attributes:
        factor: by which the context grows.
        original_max_position_embeddings: length of the original context.
        amplitude: factor of the rotated queries and keys.
        beta_fast: turns from which a frequency is kept.
        beta_slow: turns up to which it is divided.
        truncate: True if the blend begins and ends at whole indices.
    """

    factor: float
    original_max_position_embeddings: int
    amplitude: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True

    def longest(self, max_position_embeddings: int) -> int:
        """Return the length of the longest sequence; files state that of the original one, or this one."""
        return max(max_position_embeddings, int(self.factor * self.original_max_position_embeddings))

    def __call__(self, frequencies: np.ndarray) -> np.ndarray:
        pairs = len(frequencies)
        if pairs == 1:
            return frequencies  # the one pair turns fastest
        log_ratio = np.log(frequencies[0] / frequencies[-1]) / (pairs - 1)  # of two neighbours

        def index_of(turns: float) -> float:
            frequency = turns * 2 * math.pi / self.original_max_position_embeddings
            return float(np.log(frequencies[0] / frequency) / log_ratio)

        low, high = index_of(self.beta_fast), index_of(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, 2 * pairs - 1)
        if low == high:
            high += 0.001  # as the papers' code does
        divided = np.clip((np.arange(pairs) - low) / (high - low), 0, 1)
        return frequencies * (1 - divided + divided / self.factor)


Scaling = LinearScaling | Llama3Scaling | LongRopeScaling | YarnScaling


@dataclass(frozen=True)
class Rope:
    """Rotary positions of one type of layer.

    Attributes:
        theta: base of the frequencies theta^(-2i / rotary_dim).
        partial_rotary_factor: the share of a head's channels, its first ones, that are rotated.
        scaling: the change of the frequencies for longer contexts; none if None.
    """

    theta: float = 10000.0
    partial_rotary_factor: float = 1.0
    scaling: Scaling | None = None

    def __post_init__(self) -> None:
        if isinstance(self.scaling, YarnScaling) and self.theta <= 1:
            raise ValueError(
                f"rope_theta must be greater than 1 for yarn, which tells fast from slow frequencies, but "
                f"came as {self.theta}."
            )

    def rotary_dim(self, head_dim: int) -> int:
        """Return the number of channels of a head that are rotated."""
        return int(head_dim * self.partial_rotary_factor)

    def frequencies(self, head_dim: int) -> np.ndarray:
        """Return the radians by which each pair of channels turns per token, (rotary_dim / 2,) float32."""
        dim = self.rotary_dim(head_dim)
        # Computed in float64 and rounded once, as positions multiply the error.
        frequencies = self.theta ** -(np.arange(0, dim, 2) / dim)
        if self.scaling is not None:
            frequencies = self.scaling(frequencies)
        return frequencies.astype(np.float32)


Rotation = tuple[jax.Array, jax.Array]
"""Cosine and sine of each token's angles, each (n, 1, rotary_dim / 2) float32."""


def rotary_angles(
    rope: Rope,
    head_dim: int,
    positions: jax.Array | np.ndarray,  # [n] int32
) -> Rotation:
    """Return the rotation of tokens at positions (n,) int32."""
    amplitude = 1.0 if rope.scaling is None else rope.scaling.amplitude
    return _angles(jnp.asarray(rope.frequencies(head_dim)), jnp.float32(amplitude), positions)


# Frequencies are an argument, not a constant, so that ropes of the same size share a compilation.
@partial(jax.jit, inline=True)
def _angles(
    frequencies: jax.Array,  # [rotary_dim / 2] float32
    amplitude: jax.Array,  # [] float32
    positions: jax.Array,  # [n] int32
) -> Rotation:
    angles = positions.astype(jnp.float32)[:, None, None] * frequencies  # [n, 1, rotary_dim / 2]
    return amplitude * jnp.cos(angles), amplitude * jnp.sin(angles)


def rotate(
    heads: jax.Array,  # [n, heads, head_dim]
    rotation: Rotation,
) -> jax.Array:  # [n, heads, head_dim]
    """Rotate the pairs (x[i], x[i + rotary_dim / 2]) of (n, heads, head_dim) by their position's angle.

    This is the half-split order in which Hugging Face stores weights. Channels from rotary_dim on are kept.
    """
    cos, sin = rotation
    half = cos.shape[-1]
    first, second, unrotated = jnp.split(heads.astype(jnp.float32), [half, 2 * half], axis=-1)
    rotated = [first * cos - second * sin, second * cos + first * sin, unrotated]
    return jnp.concatenate(rotated, axis=-1).astype(heads.dtype)
