"""What the tests run over: the formats that the registry has, and the arrays they are tried on."""

import os
import re

import jax
import jax.numpy as jnp
import numpy as np

import qpaged
from qpaged.testing._programs import factors as multipliers  # noqa: F401 - each element's scale

EVERY_FORMAT = qpaged.available_formats(wrapped=True)
"""Every format at every granularity in every set of wrappers."""


def features(spelling):
    """What the framework does otherwise for some formats than for others."""
    quantizer = qpaged.get_quantizer(spelling)
    granularity = re.sub(r"\d+", "", quantizer.granularity)
    return {
        ("granularity", granularity),
        ("bits", quantizer.bits, granularity in ("page", "channel")),
        ("scales", str(quantizer.scale_dtype), quantizer.outer_dtype is None),
        ("shifts", quantizer.shareable, "+offset" in spelling),
        ("transforms", quantizer.bits < 8, quantizer.transforms),
    }


def representatives():
    """A few formats that have every feature between them, the plainest first."""
    chosen, seen = [], set()
    for spelling in sorted(
        EVERY_FORMAT, key=lambda spelling: (spelling.count("+"), not spelling.startswith("int8"))
    ):
        if not features(spelling) <= seen:
            chosen.append(spelling)
            seen |= features(spelling)
    return tuple(chosen)


FORMATS = representatives()
"""Formats with every feature that the framework tells apart, for what is not a law."""
ALWAYS, AT_TIMES = ("int8", "int8:token", "int4"), ("int8:channel+offset", "nvfp4")
FEW = (*ALWAYS, *AT_TIMES) if os.environ.get("MORE_FORMATS") else ALWAYS
"""Formats that are written, shared and packed in different ways, for what the laws say again of every one;
MORE_FORMATS in the environment asks for more of them."""
LAWFUL = {
    "": FEW,
    "others": tuple(spelling for spelling in EVERY_FORMAT if spelling not in ALWAYS),
    "1": EVERY_FORMAT,
}[os.environ.get("EVERY_FORMAT", "")]
"""What the laws are tested for: FEW, or what EVERY_FORMAT in the environment asks for."""
CACHES = (None, *FORMATS)
DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)


def normal(*shape, seed=0, scale=1.0):
    """Gaussian float32 values."""
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape) * scale, jnp.float32)


def quantized(spelling, shape=(2, 6, 16, 32), dtype=jnp.float32):
    """A filled array of a format."""
    return qpaged.get_quantizer(spelling).quantize(normal(*shape).astype(dtype))


def leaves_equal(a, b):
    """Whether two trees hold the same bits."""
    pairs = zip(jax.tree_util.tree_leaves(a), jax.tree_util.tree_leaves(b), strict=True)
    return all(x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in pairs)
