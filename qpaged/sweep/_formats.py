"""The installed formats, as the command line lists them."""

from collections.abc import Iterable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from qpaged.quantizer import Quantizer, available_quantizers, get_quantizer

PAGE = (1, 1, 16, 128)
"""One page of one head that formats are sized on: (kv_heads, pages, page_size, head_dim)."""


@dataclass(frozen=True)
class FormatInfo:
    """One spelling that caches understand.

    Attributes:
        bits_per_element: scales included, on a page of 16 tokens at head_dim 128, logical dtype bfloat16.
        summary: the first line of the quantizer's docstring.
    """

    spelling: str
    granularity: str
    bits_per_element: float
    summary: str


def installed_formats() -> tuple[list[FormatInfo], dict[str, str]]:
    """Every installed format at each of its granularities; and the names that cannot be loaded, with why."""
    infos: list[FormatInfo] = []
    broken: dict[str, str] = {}
    for name in available_quantizers():
        try:
            granularities = get_quantizer(name).granularities
            infos += [_info(get_quantizer(f"{name}:{granularity}")) for granularity in granularities]
        except Exception as error:  # a plugin's own; the other formats are still worth having
            broken[name] = str(error)
    return infos, broken


def fitting(formats: Iterable[str], head_dim: int) -> tuple[list[str], dict[str, str]]:
    """Those of the formats that a cache of this head_dim can have; and why the others cannot."""
    fit: list[str] = []
    reasons: dict[str, str] = {}
    for spelling in formats:
        try:
            jax.eval_shape(lambda s=spelling: get_quantizer(s).empty((1, 1, 16, head_dim), jnp.bfloat16))
            fit.append(spelling)
        except Exception as error:  # a plugin's own, too
            reasons[spelling] = str(error)
    return fit, reasons


def bits_per_element(quantizer: Quantizer) -> float:
    """Bits that the format's own arrays take for each element of :data:`PAGE`."""
    pages = jax.eval_shape(lambda: quantizer.quantize(jnp.zeros(PAGE, jnp.bfloat16)))
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree_util.tree_leaves(pages))
    return 8 * size / (PAGE[0] * PAGE[1] * PAGE[2] * PAGE[3])


def _info(quantizer: Quantizer) -> FormatInfo:
    summary = (type(quantizer).__doc__ or "").strip().partition("\n")[0]
    return FormatInfo(str(quantizer), quantizer.granularity, bits_per_element(quantizer), summary)
