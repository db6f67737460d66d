"""Lists the installed formats, and those that fit a model."""

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from qpaged.formats import (
    CacheFormat,
    PoolQuantizer,
    Quantizer,
    available_quantizers,
    format_of_codes,
    get_quantizer,
)

PAGE = (1, 1, 16, 128)
"""The page that formats are sized on: (kv_heads, pages, page_size, head_dim)."""

BUILT_IN = "quantizers"  # the package of the formats that come along

LADDER = (
    "int8:channel", "int8:token+rotate", "int8:token", "int8+rotate", "int8", "fp8_e4m3:token",
    "int6:token+rotate", "int5:token+rotate",
    "int4:channel+offset+exact1/int4:token+rotate+exact1", "int4:token+rotate", "int4+rotate",
    "int4+rotate+exact128", "nvfp4",
    "int3:channel+offset+exact1/int3:token+rotate+exact1", "int2+offset+rotate",
)  # fmt: skip
"""The formats that are swept by default: what is worth a look at 8, 6, 5, 4, 3 and 2 bits."""


@dataclass(frozen=True)
class FormatInfo:
    """One spelling of a format that caches understand.

    Attributes:
        bits_per_element: scales included, on a page of 16 tokens at head_dim 128, logical dtype bfloat16.
        summary: the first line of the quantizer's docstring.
    """

    spelling: str
    granularity: str
    bits_per_element: float
    summary: str


def installed_formats() -> tuple[list[FormatInfo], dict[str, str]]:
    """Return every installed format at each of its granularities, and the error of each broken plugin."""
    infos: list[FormatInfo] = []
    broken: dict[str, str] = {}
    for name in available_quantizers():
        try:
            granularities = get_quantizer(name).granularities
            infos += [_info(get_quantizer(f"{name}:{granularity}")) for granularity in granularities]
        except Exception as error:  # A plugin may raise anything; the other formats are still worth listing.
            broken[name] = str(error)
    return infos, broken


def fitting(formats: Iterable[str], head_dim: int) -> tuple[list[str], dict[str, str]]:
    """Return the formats that a cache of this head_dim can have, and the reason why each other cannot."""
    fit: list[str] = []
    reasons: dict[str, str] = {}
    for spelling in formats:
        try:
            _check_fit(spelling, head_dim)
            fit.append(spelling)
        except Exception as error:  # A plugin may raise anything here, too.
            reasons[spelling] = str(error)
    return fit, reasons


def bits_per_element(
    quantizer: PoolQuantizer, page: tuple[int, int, int, int] = PAGE, dtype: str = "bfloat16"
) -> float:
    """Return the bits that the format's arrays take for each element of one page more, of logical ``dtype``.

    Of a packed page, where the format has exact ones. Static scales, which all pages share, add none.
    """
    packed = format_of_codes(quantizer)
    heads, pages, page_size, head_dim = page

    def bytes_of(count: int) -> int:
        pool = (heads, count, page_size, head_dim)
        leaves = jax.tree_util.tree_leaves(jax.eval_shape(lambda: packed.quantize(jnp.zeros(pool, dtype))))
        return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)

    return 8 * (bytes_of(2 * pages) - bytes_of(pages)) / math.prod(page)


def default_formats() -> list[str]:
    """Return :data:`LADDER`, and the formats that other packages bring, at each of their granularities.

    Those that go with exact pages alone are left to be named, with as many tokens as are wanted.
    """
    infos, _ = installed_formats()
    return [*LADDER, *(info.spelling for info in infos if _is_other(get_quantizer(info.spelling)))]


def _is_other(quantizer: Quantizer) -> bool:
    """Return True for a format of another package that a cache can have as it is."""
    is_built_in = type(quantizer).__module__.partition(".")[0] == BUILT_IN
    return not is_built_in and not quantizer.needs_exact_pages


def _check_fit(spelling: str, head_dim: int) -> None:
    """Raise the format's own error if it cannot make a page of this head_dim, of keys or of values."""
    for quantizer in CacheFormat.of(spelling).layer(0):
        if quantizer is not None:
            packed = format_of_codes(quantizer)
            if quantizer is packed and packed.needs_exact_pages:
                raise ValueError(f"{packed} goes with exact pages alone, as {packed}+exact128.")
            jax.eval_shape(functools.partial(packed.empty, (1, 1, 16, head_dim), jnp.bfloat16))


def _info(quantizer: Quantizer) -> FormatInfo:
    summary = (type(quantizer).__doc__ or "").strip().partition("\n")[0]
    return FormatInfo(str(quantizer), quantizer.granularity, bits_per_element(quantizer), summary)
