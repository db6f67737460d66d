"""What the tests run over: the formats that the registry has, and the arrays they are tried on."""

import os
import re
from importlib.metadata import entry_points

import jax.numpy as jnp

import qpaged

EVERY_FORMAT = qpaged.available_formats(wrapped=True)
"""Every format at every granularity in every set of wrappers."""

BUILT_IN_NAMES = {
    point.name
    for point in entry_points(group="qpaged.quantizers")
    if point.dist is not None and point.dist.name == "qpaged"
}


def is_built_in(spelling):
    """Return True if the format and all its wrappers are of this distribution."""
    name, *wrappers = spelling.split("+")
    return {name.split(":")[0], *(f"+{wrapper}" for wrapper in wrappers)} <= BUILT_IN_NAMES


BUILT_IN = tuple(spelling for spelling in EVERY_FORMAT if is_built_in(spelling))
"""The formats of this distribution, likewise."""


def features(spelling):
    """What the framework does otherwise for some formats than for others."""
    quantizer = qpaged.get_quantizer(spelling)
    granularity = re.sub(r"\d+", "", quantizer.granularity)
    return {
        ("granularity", granularity),
        ("bits", quantizer.bits, granularity in ("page", "channel")),
        ("scales", str(quantizer.scale_dtype), quantizer.global_scale is None),
        ("shifts", quantizer.growth is not None, "+offset" in spelling),
        ("transforms", quantizer.bits < 8, quantizer.transform is not None),
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
