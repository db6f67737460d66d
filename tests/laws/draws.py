"""What hypothesis draws for the laws: values of every magnitude, and ways to write them."""

import numpy as np
from hypothesis import strategies as st
from laws import HEAD_DIM, HEADS, PAGES, TOKENS

SEEDS = st.integers(0, 2**32 - 1)


@st.composite
def rows(draw):
    """(TOKENS, heads, head_dim) float32: gaussian, or of wild magnitudes, zeros and subnormals among them."""
    rng = np.random.default_rng(draw(SEEDS))
    shape = (TOKENS, HEADS, HEAD_DIM)
    values = rng.normal(size=shape)
    kind = draw(
        st.sampled_from(["gaussian", "growing", "outliers", "wild", "tiny", "huge", "constant", "powers"])
    )
    if kind == "growing":
        values *= 1.3 ** np.arange(TOKENS)[:, None, None]
    elif kind == "outliers":
        values *= np.where(rng.random(shape) < 0.02, 1e4, 1)
    elif kind == "wild":
        values *= 10.0 ** rng.uniform(-44, 37, size=shape)
    elif kind == "tiny":
        values *= 10.0 ** rng.uniform(-46, -36, size=shape)
    elif kind == "huge":
        values = np.clip(values, -1, 1) * 3.4e38
    elif kind == "constant":
        values = np.full(shape, rng.choice([1.0, -1.0, 127.0, 128.0, 1e-3, 448.0]))
    elif kind == "powers":
        values = np.sign(values) * 2.0 ** rng.integers(-140, 127, size=shape)
    zeroed = draw(st.sampled_from([0.0, 0.1, 1.0]))
    dropped = rng.random((TOKENS, 1, 1)) < zeroed * rng.random()
    return np.where(dropped, 0, values).astype(np.float32)


@st.composite
def chunks(draw):
    """Token indices in some order, cut somewhere: one prefill, chunks, token by token, shuffled."""
    rng = np.random.default_rng(draw(SEEDS))
    tokens = rng.permutation(TOKENS) if draw(st.booleans()) else np.arange(TOKENS)
    cuts = draw(st.sampled_from([0, 1, 3, TOKENS - 1]))
    at = np.sort(rng.choice(np.arange(1, TOKENS), size=cuts, replace=False))
    return np.split(tokens, at)


@st.composite
def places(draw):
    """(position, table): some in range, without a slot written twice, and some out of range every way."""
    rng = np.random.default_rng(draw(SEEDS))
    position = rng.permutation(np.arange(-6, 40))[:TOKENS].astype(np.int32)
    position[rng.integers(TOKENS, size=3)] = rng.choice([-1, -(2**31), 2**31 - 1, 24, 1000], size=3)
    table = rng.permutation(PAGES)[:3].astype(np.int32)
    table[rng.integers(3)] = rng.choice([PAGES, PAGES + 1, -1, -PAGES, 2**31 - 1, table[0]])
    return position, table
