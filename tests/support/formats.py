"""The formats that tests run over, all of them from the registry."""

import os
import re
from importlib.metadata import entry_points

import jax.numpy as jnp

import qpaged
from qpaged.arrays._packing import codes_per_byte, has_planes
from support.long import first_short

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
"""The formats among them that this distribution brings."""


def features(spelling):
    """Return the properties of a format on which the framework's code branches."""
    quantizer = qpaged.get_quantizer(spelling)
    granularity = re.sub(r"\d+", "", quantizer.granularity)
    return {
        ("granularity", granularity),
        ("bytes", codes_per_byte(quantizer.bits), has_planes(quantizer.bits)),
        ("shared", quantizer.bits < 8, granularity in ("page", "channel")),
        ("scales", str(quantizer.scale_dtype), quantizer.global_scale is None),
        ("shifts", quantizer.growth is not None, "+offset" in spelling),
        ("transforms", quantizer.bits < 8, quantizer.transform is not None),
    }


ALWAYS = ("int8", "int8:token", "int4")


def representatives():
    """Return a few formats that have every feature between them, those of ALWAYS first."""
    chosen = list(ALWAYS)
    missing = set().union(*map(features, EVERY_FORMAT)) - set().union(*map(features, ALWAYS))
    while missing:
        most = max(EVERY_FORMAT, key=lambda spelling: len(features(spelling) & missing))
        chosen.append(most)
        missing -= features(most)
    return tuple(chosen)


FORMATS = representatives()
"""Formats with every feature on which the framework branches, for tests that are no laws."""
FEW = ALWAYS
if os.environ.get("MORE_FORMATS"):
    FEW = (*ALWAYS, "int8:channel+offset", "nvfp4")
"""Formats that are written, shared and packed in different ways, for tests that the laws repeat for every
format. MORE_FORMATS in the environment adds some."""
ALIKE = re.compile(
    r"int[356](:group(64|128).*|(:\w+)?\+(offset|rotate))"
    r"|int[56].*\+.*|int2:(token|page)\+.*|int[24]:group(64|128)\+.*|fp8_e5m2.*\+.*"
)
"""Formats that differ from others by a width alone: their laws are tested by EVERY_FORMAT=1 only."""
PACKED = qpaged.available_formats(wrapped=True, packed=True)
"""EVERY_FORMAT, and those that go with exact pages alone."""
LAWFUL = {
    "": FEW,
    "others": tuple(name for name in PACKED if name not in ALWAYS and not ALIKE.fullmatch(name)),
    "1": PACKED,
}[os.environ.get("EVERY_FORMAT", "")]
"""The formats whose laws are tested: FEW, or those that EVERY_FORMAT in the environment asks for."""
WITH_LONG = first_short(len(ALWAYS), FORMATS)
"""FORMATS, of which those beyond ALWAYS are long tests."""
CACHES = (None, *FORMATS)
DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)
