"""Keys and values that are hard to quantize, and queries that attend to them: one function for each case.

All cases start from the same unit gaussian queries, keys and values. The case changes them, and rotary
positions rotate queries and keys, since caches hold rotated keys. Where all keys are large or small, queries
are the inverse, so that attention is neither uniform nor all on one token; the results state its entropy.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

THETA = 10_000.0
BIAS_NORM = 605.0
BIAS_PAIRS = 2  # rotary pairs of channels that carry the bias
OUTLIER = 30.0
OUTLIER_SHARE = 0.01
GROWTH = 1.2
RUN = 64  # tokens until growth starts again
SINK_PAIRS = 8  # slow rotary pairs of channels, along which the sink's key points
SINK_KEY = 10.0
SINK_VALUE = 0.1
SMALL = 1e-6


@dataclass(frozen=True)
class Sizes:
    """The sizes of a layer. Every ``query_step``-th token has queries."""

    tokens: int = 512
    kv_heads: int = 2
    queries_per_head: int = 4
    head_dim: int = 128
    query_step: int = 8

    @property
    def query_position(self) -> np.ndarray:
        """Return each query's position, [queries]; the last one is that of the last token."""
        positions = np.arange(self.query_step - 1, self.tokens, self.query_step)
        return np.repeat(positions, self.queries_per_head)


@dataclass(frozen=True)
class Case:
    """The inputs of one layer's attention, float64.

    Attributes:
        query: [kv_heads, queries, head_dim]; the queries of a KV head share its keys.
        query_position: [queries]; a query sees the keys up to its own position.
        key: [kv_heads, tokens, head_dim].
        value: [kv_heads, tokens, head_dim].
    """

    query: np.ndarray
    query_position: np.ndarray
    key: np.ndarray
    value: np.ndarray

    def scaled(self, amplitude: float) -> "Case":
        """Return keys and values ``amplitude`` times as large, rounded to float32, with the same logits."""
        key = np.float64(np.float32(amplitude * self.key))
        value = np.float64(np.float32(amplitude * self.value))
        return replace(self, query=self.query / amplitude, key=key, value=value)


def make_case(name: str, sizes: Sizes, seed: int = 0) -> Case:
    """Return the case of that name in :data:`CASES`, rotated."""
    rng = np.random.default_rng(seed)
    position = sizes.query_position
    shape = (sizes.kv_heads, sizes.tokens, sizes.head_dim)
    query = rng.normal(size=(sizes.kv_heads, len(position), sizes.head_dim))
    key = rng.normal(size=shape)
    value = rng.normal(size=shape)
    case = CASES[name](Case(query, position, key, value), rng)
    return replace(case, query=rotate(case.query, position), key=rotate(case.key, np.arange(sizes.tokens)))


def rotate(x: np.ndarray, position: np.ndarray) -> np.ndarray:
    """Apply Llama's rotary positions: turn the pair (x[i], x[i + d/2]) by position * theta^(-2i/d).

    Args:
        x: [..., tokens, head_dim].
        position: [tokens].
    """
    half = x.shape[-1] // 2
    angle = position[:, None] * THETA ** (-np.arange(half) / half)
    first = x[..., :half]
    second = x[..., half:]
    cos = np.cos(angle)
    sin = np.sin(angle)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def gaussian(case: Case, rng: np.random.Generator) -> Case:
    """Unit gaussians."""
    return case


def bias_slow(case: Case, rng: np.random.Generator) -> Case:
    """Key biases of norm 605 on the 4 channels that turn slowest, as Qwen2 has."""
    return _biased(case, rng, slice(-BIAS_PAIRS, None))


def bias_fast(case: Case, rng: np.random.Generator) -> Case:
    """The same bias on the 4 channels that turn fastest."""
    return _biased(case, rng, slice(BIAS_PAIRS))


def _biased(case: Case, rng: np.random.Generator, pairs: slice) -> Case:
    """Add a bias of norm ``BIAS_NORM`` to all keys, on some rotary pairs of channels."""
    heads, _, dim = case.key.shape
    bias = np.zeros((heads, 1, 2, dim // 2))
    signs = rng.choice([-1.0, 1.0], (heads, 1, 2, BIAS_PAIRS))
    bias[..., pairs] = signs * BIAS_NORM / math.sqrt(2 * BIAS_PAIRS)
    return replace(case, key=case.key + bias.reshape(heads, 1, dim))


def outliers(case: Case, rng: np.random.Generator) -> Case:
    """1 % of the channels of each head's keys 30 times as large: 1 of 128, which rotates into 2."""
    heads, _, dim = case.key.shape
    loud = np.ones((heads, 1, dim))
    for head in range(heads):
        loud[head, 0, rng.choice(dim, max(1, round(OUTLIER_SHARE * dim)), replace=False)] = OUTLIER
    return replace(case, key=case.key * loud)


def heavy_tails(case: Case, rng: np.random.Generator) -> Case:
    """Keys and values from Student's t with 3 degrees of freedom, of unit variance."""
    key = rng.standard_t(3, case.key.shape) / math.sqrt(3)
    value = rng.standard_t(3, case.value.shape) / math.sqrt(3)
    return replace(case, key=key, value=value)


def growing(case: Case, rng: np.random.Generator) -> Case:
    """Every token 1.2 times the one before, in runs of 64; queries are as small as keys are large."""
    size = GROWTH ** (np.arange(case.key.shape[1]) % RUN)[:, None]
    query = case.query / np.sqrt(np.mean(np.square(size)))
    return replace(case, query=query, key=case.key * size, value=case.value * size)


def sink(case: Case, rng: np.random.Generator) -> Case:
    """A first token with a key of 10 times the norm, on slow channels, that every query is drawn to."""
    heads, tokens, dim = case.key.shape
    direction = np.zeros((heads, 2, dim // 2))
    direction[..., -SINK_PAIRS:] = rng.choice([-1.0, 1.0], (heads, 2, SINK_PAIRS))
    direction = direction.reshape(heads, 1, dim) / math.sqrt(2 * SINK_PAIRS)
    key = case.key.copy()
    value = case.value.copy()
    key[:, :1] = SINK_KEY * math.sqrt(dim) * direction
    value[:, 0] *= SINK_VALUE
    # Adds to each query what makes its logit of the sink match the sum of all the others.
    along = math.log(tokens) / SINK_KEY - (case.query * direction).sum(axis=-1, keepdims=True)
    return replace(case, query=case.query + along * direction, key=key, value=value)


def near_zero(case: Case, rng: np.random.Generator) -> Case:
    """Keys and values of 1e-6, and queries of 1e6, so that attention is as in ``gaussian``."""
    return case.scaled(SMALL)


def near_zero_as_is(case: Case, rng: np.random.Generator) -> Case:
    """Keys and values of 1e-6 with queries of 1: attention is uniform."""
    return replace(near_zero(case, rng), query=case.query)


CASES: dict[str, Callable[[Case, np.random.Generator], Case]] = {
    case.__name__: case
    for case in (
        gaussian, bias_slow, bias_fast, outliers, heavy_tails, growing, sink, near_zero, near_zero_as_is,
    )
}  # fmt: skip
