"""The inputs that the laws are checked on: values of every magnitude, write orders, indices out of range."""

from collections.abc import Iterator

import numpy as np

from qpaged.testing._pools import LARGEST_INDEX, PAGES, TOKENS

GAUSSIAN = "gaussian"
KINDS = (
    GAUSSIAN,
    "growing",  # each token is larger than the one before, so that shared scales grow
    "outliers",
    "shifted",  # far from zero, and all of one sign
    "wild",  # every magnitude of float32
    "tiny",  # subnormals among them
    "huge",  # up to the largest finite number
    "constant",
    "powers",  # of two, where scales and codes change over
    "zeros",
)
CONSTANTS = (1.0, -1.0, 127.0, 128.0, 1e-3, 448.0)
NOT_FINITE = (np.nan, np.inf, -np.inf)

Chunks = list[np.ndarray]
"""Token indices, in the order in which they are written; each array is one prefill."""


def rows(kind: str, seed: int, shape: tuple[int, ...]) -> np.ndarray:
    """Return finite float32 values [tokens, heads, head_dim] of a kind; odd seeds have tokens of zeros."""
    rng = np.random.default_rng([KINDS.index(kind), seed])
    values = rng.normal(size=shape)
    if kind == "growing":
        values *= 1.3 ** np.arange(len(values))[:, None, None]
    elif kind == "outliers":
        values *= np.where(rng.random(shape) < 0.02, 1e4, 1)
    elif kind == "shifted":
        values += rng.choice([-1, 1]) * 10.0 ** rng.uniform(0, 4)
    elif kind == "wild":
        values *= 10.0 ** rng.uniform(-44, 37, size=shape)
    elif kind == "tiny":
        values *= 10.0 ** rng.uniform(-46, -36, size=shape)
    elif kind == "huge":
        values = np.clip(values, -1, 1) * 3.4e38
    elif kind == "constant":
        values = np.full(shape, rng.choice(CONSTANTS))
    elif kind == "powers":
        values = np.sign(values) * 2.0 ** rng.integers(-140, 127, size=shape)
    zeroed = rng.random((len(values), 1, 1)) < (seed % 2) * rng.random()
    return np.where(zeroed | (kind == "zeros"), 0, values).astype(np.float32)


def every_kind(shape: tuple[int, ...], seeds: int = 2) -> Iterator[tuple[str, np.ndarray]]:
    """Yield (name, rows) of every kind, for some seeds each."""
    for seed in range(seeds):
        for kind in KINDS:
            yield f"{kind} values (seed {seed})", rows(kind, seed, shape)


def write_orders(seed: int) -> dict[str, Chunks]:
    """Return ways to write a sequence other than in one prefill, by name."""
    rng = np.random.default_rng(seed)
    tokens = np.arange(TOKENS)
    shuffled = rng.permutation(TOKENS)
    cuts = np.sort(rng.choice(np.arange(1, TOKENS), size=3, replace=False))
    return {
        "in chunks": np.split(tokens, cuts),
        "in chunks out of order": np.split(shuffled, cuts),
        "token by token": np.split(tokens, TOKENS),
        "token by token, the last first": np.split(tokens[::-1], TOKENS),
        "shuffled in one prefill": [shuffled],
    }


def write_order(turn: int) -> tuple[str, Chunks]:
    """Return (name, chunks) of one of the write orders, another each turn."""
    orders = list(write_orders(turn).items())
    return orders[turn % len(orders)]


def indices_out_of_range(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return positions and a table without duplicate slots, some of each out of range in every way."""
    rng = np.random.default_rng(seed)
    position = rng.permutation(np.arange(-6, 40))[:TOKENS].astype(np.int32)
    invalid_positions = [-1, -LARGEST_INDEX - 1, LARGEST_INDEX, 24, 1000]
    position[rng.choice(TOKENS, 3, replace=False)] = rng.choice(invalid_positions, 3)
    table = rng.permutation(PAGES)[:3].astype(np.int32)
    table[rng.integers(3)] = rng.choice([PAGES, PAGES + 1, -1, -PAGES, LARGEST_INDEX, table[0]])
    return position, table
