"""Formats that break a law each, and how they are written when they break it by accident."""

from typing import Any

import jax.numpy as jnp

import qpaged
from qpaged.testing import Subject
from quantizers import Fp8E4M3, Int8Floor, Int8Token


class Overconfident(Int8Token):
    """Law 1: the bound of a rounding, halved."""

    bound = 0.25


class Vague(Int8Token):
    """Law 1: a bound that no error reaches, and that says nothing."""

    bound = 1e6


class Undeclared(Fp8E4M3):
    """Law 2: subnormals are rounded again as scales grow, and nothing is said of it."""

    order_bound = 0.0


class RoundsAgain(Int8Floor):
    """Law 2: codes to the nearest under a shared scale; whoever grows it rounds twice."""

    def encode(self, units):
        return jnp.clip(jnp.round(units), -127, 127).astype(jnp.int8)

    def decode(self, codes, dtype):
        return codes.astype(dtype)

    def grow(self, codes, old, new):
        return qpaged.Quantizer.grow(self, codes, old, new)


class AcrossHeads(Int8Token):
    """Law 3: one scale for all heads of a token."""

    def block(self, shape):
        return (*shape[:-3], 1, 1, shape[-1]) if len(shape) < 4 else (shape[0], 1, 1, shape[-1])


class AcrossPages(Int8Floor):
    """Laws 3 and 8: one scale for two pages, which go to different sequences."""

    def block(self, shape):
        return (1, 2, *shape[-2:])


class ZerosPastTheEnd(Int8Floor):
    """Law 4: what is read past the end looks like an empty page."""

    past_end = 0


class WideCodes(Int8Token):
    """Law 6: codes of 16 bits that are said to be of 8."""

    def code_dtype(self, dtype):
        return jnp.int16

    def encode(self, units):
        return super().encode(units).astype(jnp.int16)


class SpareScales(Int8Token):
    """Law 6: fresh pages of more scales than written ones have, as if there were a spare for each channel."""

    def empty(self, shape, dtype):
        pages = super().empty(shape, dtype)
        return pages.like(pages.codes, jnp.broadcast_to(pages.scales, pages.shape))


class Thirds(Int8Floor):
    """Law 7: read back as (c + 1/3) s, which bfloat16 does not hold."""

    bound = 2 / 3

    def decode(self, codes, dtype):
        return codes.astype(dtype) + jnp.asarray(1 / 3, dtype)


class Forgetful(Int8Floor):
    """Law 8: a configuration without its options."""

    @property
    def config(self) -> dict[str, Any]:
        return {"name": self.name}


class NeverEmpty(Int8Floor):
    """Law 9: an empty block's scale counts as one."""

    def multiplier(self, scales):
        return jnp.where(scales == 0, 1, super().multiplier(scales))


class WholePool(Subject):
    """Law 5: every decode reads all pages and writes them anew; a format by itself has no say in that."""

    def decode_step(self, view, rows, position, table):
        view = super().decode_step(view, rows, position, table)
        values = view.value_pages
        return view.replace(value_pages=self.quantizer.quantize(values.dequantize(), values.dtype))


class WholePoolRead(Subject):
    """Law 5: attention dequantizes the pool first."""

    def attend_step(self, view, query, position, table):
        plain = view.replace(key_pages=view.key_pages.dequantize(), value_pages=view.value_pages.dequantize())
        return super().attend_step(plain, query, position, table)


class LateScales(Subject):
    """Law 8: a copy that takes the codes along and leaves the scales."""

    def copied(self, view, source, target):
        after, past = super().copied(view, source, target)
        keys = after.key_pages.like(after.key_pages.codes, view.key_pages.scales)
        return after.replace(key_pages=keys), past
