"""Formats, and ways to write them, that each break one law."""

from typing import Any

import jax.numpy as jnp

import qpaged
from qpaged.testing import Subject
from quantizers import Fp8E4M3, Int4, Int8Floor, Int8Token


class Overconfident(Int8Token):
    """Law 1: states half the bound of its rounding."""

    bound = 0.25


class Vague(Int8Token):
    """Law 1: states a bound so large that it excludes nothing."""

    bound = 1e6


class Undeclared(Fp8E4M3):
    """Law 2: rounds subnormals again as scales grow, but declares no ``order_bound``."""

    order_bound = 0.0


class RoundsAgain(Int8Floor):
    """Law 2: rounds to the nearest code under a shared scale, and again whenever the scale grows."""

    def encode(self, units):
        return jnp.clip(jnp.round(units), -127, 127).astype(jnp.int8)

    def decode(self, codes, dtype):
        return codes.astype(dtype)

    @property
    def growth(self):
        return qpaged.FitAgain(self)


class AcrossHeads(Int8Token):
    """Law 3: shares one scale among all heads of a token."""

    def block(self, shape):
        return (*shape[:-3], 1, 1, shape[-1]) if len(shape) < 4 else (shape[0], 1, 1, shape[-1])


class AcrossPages(Int8Floor):
    """Laws 3 and 8: shares one scale between two pages, which may go to different sequences."""

    def block(self, shape):
        return (1, 2, *shape[-2:])


class ZerosPastTheEnd(Int8Floor):
    """Law 4: reads past the end as an empty page."""

    nan_scale = 0


class WideCodes(Int8Token):
    """Law 6: stores codes in 16 bits and states 8."""

    def code_dtype(self, dtype):
        return jnp.int16

    def encode(self, units):
        return super().encode(units).astype(jnp.int16)


class SpareScales(Int8Token):
    """Law 6: makes fresh pages with a scale for each channel, more than written pages have."""

    def empty(self, shape, dtype):
        pages = super().empty(shape, dtype)
        scales = jnp.broadcast_to(pages.scales, pages.shape)
        return pages.like(pages.codes, pages.parts._replace(scales=scales))


class Thirds(Int8Floor):
    """Law 7: reads back (c + 1/3) s, which is not exact in bfloat16."""

    bound = 2 / 3

    def decode(self, codes, dtype):
        return codes.astype(dtype) + jnp.asarray(1 / 3, dtype)


class DividedByThree(Int8Token):
    """Law 7: reads back c s / 3, whose rounding to bfloat16 XLA leaves out within one program."""

    bound = 1.0

    def scale(self, absmax):
        return super().scale(absmax) * 3

    def decode(self, codes, dtype):
        return codes.astype(dtype) / jnp.asarray(3, dtype)

    def encode(self, units):
        return super().encode(units * 3)


class Wide(Int8Floor):
    """Law 7: reads back 1024 c s, which bfloat16 holds and float16 does not."""

    def decode(self, codes, dtype):
        return super().decode(codes, dtype) * jnp.asarray(1024, dtype)

    def multiplier(self, scales):
        return super().multiplier(scales) / 1024


class Forgetful(Int8Floor):
    """Law 8: leaves its options out of its configuration."""

    @property
    def config(self) -> dict[str, Any]:
        return {"name": self.name}


class NeverEmpty(Int8Floor):
    """Law 9: treats the scale of an empty block as one."""

    def multiplier(self, scales):
        return jnp.where(scales == 0, 1, super().multiplier(scales))


class WholePool(Subject):
    """Law 5: quantizes the whole pool anew at every decode; no format alone can do that."""

    def decode_step(self, view, rows, position, table):
        view = super().decode_step(view, rows, position, table)
        values = view.value_pages
        return view.replace(value_pages=self.quantizer.quantize(values.dequantize(), values.dtype))


class WholePoolRead(Subject):
    """Law 5: dequantizes the whole pool before attention."""

    def attend_step(self, view, query, position, table):
        plain = view.replace(key_pages=view.key_pages.dequantize(), value_pages=view.value_pages.dequantize())
        return super().attend_step(plain, query, position, table)


class LateScales(Subject):
    """Law 8: copies codes without their scales."""

    def copy_pages(self, view, source, target):
        after = super().copy_pages(view, source, target)
        keys = after.key_pages.like(after.key_pages.codes, view.key_pages.parts)
        return after.replace(key_pages=keys)

    def copied(self, view, source, target):
        after, past_end = super().copied(view, source, target)
        keys = after.key_pages.like(after.key_pages.codes, view.key_pages.parts)
        return after.replace(key_pages=keys), past_end


class FirstTargetWins(Subject):
    """Law 8: of several pairs with one target, copies the first and not the last."""

    def copy_pages(self, view, source, target):
        return super().copy_pages(view, source[::-1].copy(), target[::-1].copy())


class CopiesThePool(Subject):
    """Law 5: copies pages by a choice over the whole pool; no format alone can do that."""

    def copy_step(self, view, source, target):
        after = view.copy_pages(source, target)
        codes = jnp.where(jnp.any(source != target), after.key_pages.codes, view.key_pages.codes)
        return after.replace(key_pages=after.key_pages.like(codes, after.key_pages.parts))


class FallingScale(Int8Token):
    """Law 2: takes a smaller scale for very large values."""

    def scale(self, absmax):
        return jnp.where(absmax > 1e4, 1.0, super().scale(absmax))


class TooManyCodes(Int4):
    """Law 6: gives codes from -9 to 8, of which four bits hold sixteen."""

    def encode(self, units):
        return jnp.clip(jnp.round(units), -9, 8).astype(jnp.int8)


class ScalesByPage(Subject):
    """Law 8: a copy of pages changes the static scales, as if they were a page's own."""

    def copy_pages(self, view, source, target):
        return with_larger_key_scales(super().copy_pages(view, source, target))


class ScalesOfTheLast(Subject):
    """Law 3: a write fits the static scales to itself."""

    def write(self, view, rows, *where):
        view = super().write(view, rows, *where)
        return view.with_scales(key=jnp.full(view.key_pages.scales.size, abs(rows).max() / 448 + 1e-3))


class ScalesCleared(Subject):
    """Law 9: a reset clears the static scales, as if they were a page's own."""

    def reset(self, view, pages):
        return with_larger_key_scales(super().reset(view, pages))


def with_larger_key_scales(view):
    """Return a view under whose scales keys read as more than was written."""
    return view.with_scales(key=2 * view.key_pages.scales.reshape(-1))
