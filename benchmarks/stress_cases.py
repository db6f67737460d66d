"""Keys and values that are hard to quantize, one function a case, with queries to attend to them.

All cases start from the same unit gaussian queries, keys and values, which the case changes and their
positions rotate; caches hold keys rotated. Where all keys are large or small, queries are the inverse, so
that attention is neither uniform nor all on one token; the results tell its entropy.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

THETA = 10_000.0
BIAS_NORM, BIAS_PAIRS = 605.0, 2
OUTLIER, OUTLIER_SHARE = 30.0, 0.01
GROWTH, RUN = 1.2, 64
SINK_PAIRS, SINK_KEY, SINK_VALUE = 8, 10.0, 0.1
SMALL = 1e-6


@dataclass(frozen=True)
class Sizes:
    """How large a layer is, and which of its tokens ask: every ``query_step``-th."""

    tokens: int = 512
    kv_heads: int = 2
    queries_per_head: int = 4
    head_dim: int = 128
    query_step: int = 8

    @property
    def query_position(self) -> np.ndarray:
        """(queries,) where each query stands; the last one at the last token."""
        asking = np.arange(self.query_step - 1, self.tokens, self.query_step)
        return np.repeat(asking, self.queries_per_head)


@dataclass(frozen=True)
class Case:
    """What one layer is given, float64.

    Attributes:
        query: (kv_heads, queries, head_dim); those of a KV head share its keys.
        query_position: (queries,); a query sees the keys up to its own position.
        key: (kv_heads, tokens, head_dim).
        value: likewise.
    """

    query: np.ndarray
    query_position: np.ndarray
    key: np.ndarray
    value: np.ndarray

    def scaled(self, amplitude: float) -> "Case":
        """Keys and values ``amplitude`` times as large, as float32 holds them, with the same logits."""
        key, value = (np.float64(np.float32(amplitude * x)) for x in (self.key, self.value))
        return replace(self, query=self.query / amplitude, key=key, value=value)


def make_case(name: str, sizes: Sizes, seed: int = 0) -> Case:
    """The case of that name in :data:`CASES`, rotated."""
    rng = np.random.default_rng(seed)
    position = sizes.query_position
    shape = (sizes.kv_heads, sizes.tokens, sizes.head_dim)
    query = rng.normal(size=(sizes.kv_heads, len(position), sizes.head_dim))
    case = CASES[name](Case(query, position, rng.normal(size=shape), rng.normal(size=shape)), rng)
    return replace(case, query=rotate(case.query, position), key=rotate(case.key, np.arange(sizes.tokens)))


def rotate(x: np.ndarray, position: np.ndarray) -> np.ndarray:
    """Rotary positions as Llama has them: pairs (x[i], x[i + d/2]) turned by position * theta^(-2i/d).

    Args:
        x: (..., tokens, head_dim).
        position: (tokens,).
    """
    half = x.shape[-1] // 2
    angle = position[:, None] * THETA ** (-np.arange(half) / half)
    first, second = x[..., :half], x[..., half:]
    cos, sin = np.cos(angle), np.sin(angle)
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
    key, value = (rng.standard_t(3, x.shape) / math.sqrt(3) for x in (case.key, case.value))
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
    key, value = case.key.copy(), case.value.copy()
    key[:, :1] = SINK_KEY * math.sqrt(dim) * direction
    value[:, 0] *= SINK_VALUE
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
