"""The programs that the laws run, each compiled once for a format."""

import functools
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp

import qpaged
from qpaged.implicit import use_implicit_args
from qpaged.testing._pool import (
    BATCH,
    GROUP,
    HEADS,
    MANY_PAGES,
    PAGES,
    QUERIES,
    TABLE,
    TOKENS,
    fresh,
    head_dim,
)

KEPT = 16  # formats whose programs are kept
SMALL = (jnp.float32, jnp.float16)  # the dtypes of keys and of values
LARGE = (jnp.float32, jnp.bfloat16)

ROW = jax.ShapeDtypeStruct((TOKENS,), jnp.int32)
PAGE_ROW = jax.ShapeDtypeStruct(TABLE.shape, jnp.int32)


@dataclass(frozen=True)
class Program:
    """A compiled program, and what it was compiled from."""

    run: Any
    jaxpr: Any


def compiled(function: Any, *args: Any, donate: tuple[int, ...] = (), quickly: bool = True) -> Program:
    """``function`` compiled ahead for arguments like these; ``quickly``, the compiler optimizes little."""
    traced = jax.jit(function, donate_argnums=donate).trace(*args)
    options = {"xla_backend_optimization_level": 0} if quickly else None
    return Program(traced.lower().compile(compiler_options=options), traced.jaxpr)


@dataclass(frozen=True)
class PagePrograms:
    """What is done to the pages of a small pool, keys in float32 and values in float16."""

    quantizer: qpaged.Quantizer

    @cached_property
    def fresh(self) -> Any:
        """A view in which nothing was written."""
        return fresh(self.quantizer, SMALL)

    @cached_property
    def write(self) -> Program:
        """A prefill: (view, keys, values, position, table) -> view."""

        def prefill(view, keys, values, position, table):
            metadata = qpaged.PagedAttentionMetadata.prefill(position=position, page_table=table)
            return view.write_prefill_to_cache(keys, values, metadata)

        return compiled(prefill, self.fresh, rows(self.quantizer), rows(self.quantizer), ROW, PAGE_ROW)

    @cached_property
    def reset(self) -> Program:
        """(view, pages) -> view."""
        return compiled(qpaged.PagedAttentionCacheView.reset_pages, self.fresh, PAGE_ROW)

    @cached_property
    def copy(self) -> Program:
        """Pages copied by code for plain ones, and pages past the end as it reads them."""
        return compiled(_copy, self.fresh, PAGE_ROW, PAGE_ROW)

    @cached_property
    def read_small(self) -> Program:
        """:func:`_reads` of the small pool."""
        return _reads(self.quantizer, SMALL)

    @cached_property
    def read_large(self) -> Program:
        """:func:`_reads` of pages that were moved out of a large pool."""
        return _reads(self.quantizer, LARGE)


@dataclass(frozen=True)
class StepPrograms:
    """The steps of a model, on a large pool of which nothing is allocated here, values in bfloat16."""

    subject: Any

    @property
    def view(self) -> Any:
        """An abstract view of many pages."""
        return jax.eval_shape(lambda: fresh(self.subject.quantizer, LARGE, MANY_PAGES))

    @cached_property
    def decode(self) -> Program:
        """Decode steps, the view their carry: (view, rows, position, table) -> view, in place."""

        def steps(view, rows, position, table):
            def step(view, now):
                return self.subject.decode_step(view, *now, table), None

            return jax.lax.scan(step, view, (rows, position))[0]

        batch = jax.ShapeDtypeStruct((TOKENS, BATCH, *self.subject.shape[1:]), jnp.float32)
        shapes = [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((TOKENS, BATCH), (BATCH, len(TABLE)))]
        # As models are compiled, so that prefills need not be: equal bits of both tell more this way.
        return compiled(steps, self.view, batch, *shapes, donate=(0,), quickly=False)

    @cached_property
    def attend(self) -> Program:
        """Decode attention: (view, query, position, table) -> by backend."""
        query = jax.ShapeDtypeStruct((QUERIES, GROUP * HEADS, self.subject.shape[-1]), jnp.float32)
        shapes = [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((QUERIES,), (QUERIES, len(TABLE)))]
        return compiled(self.subject.attend_step, self.view, query, *shapes)


of_pages = functools.lru_cache(KEPT)(PagePrograms)
of_steps = functools.lru_cache(KEPT)(StepPrograms)


def rows(quantizer: qpaged.Quantizer) -> jax.ShapeDtypeStruct:
    """The shape of a sequence's keys, or of its values."""
    return jax.ShapeDtypeStruct((TOKENS, HEADS, head_dim(quantizer)), jnp.float32)


def _copy(view: Any, source: Any, target: Any) -> tuple[Any, Any]:
    @use_implicit_args
    def copy(keys, values):
        past = jnp.array([PAGES])
        pools = [pool.at[:, target].set(pool[:, source]) for pool in (keys, values)]
        return pools, [jnp.take(pool, past, axis=1, mode="fill") for pool in (keys, values)]

    (keys, values), past = copy(view.key_pages, view.value_pages)
    plain = [pages.materialize() if isinstance(pages, qpaged.QuantizedArray) else pages for pages in past]
    return view.replace(key_pages=keys, value_pages=values), plain


def _reads(quantizer: qpaged.Quantizer, dtypes: tuple[Any, Any]) -> Program:
    """What the slots of a sequence hold: (view, table, keys, values) -> (of keys, of values)."""

    def both(view, table, keys, values):
        wanted = (view.key_pages, keys), (view.value_pages, values)
        return [_read(pages, table, want) for pages, want in wanted]

    view = jax.eval_shape(lambda: fresh(quantizer, dtypes))
    return compiled(both, view, PAGE_ROW, rows(quantizer), rows(quantizer))


def _read(pages: Any, table: Any, want: Any) -> dict[str, Any]:
    def slots(pool):
        """(tokens, heads, head_dim)"""
        taken = jnp.moveaxis(jnp.take(pool, table, axis=1), 0, 2)
        return taken.reshape(-1, *taken.shape[2:])[: len(want)]

    units = pages.values(jnp.float32)
    narrow = pages.values(jnp.bfloat16).astype(jnp.float32)
    return {
        "values": slots(pages.dequantize()),
        "materialized": slots(pages.materialize()),
        "bound": pages.quantizer.error_bound(want, slots(factors(pages))),
        "units": slots(units),
        "inexact": slots(units != narrow) if pages.scales is not None else jnp.zeros(want.shape, bool),
    }


def factors(pages: Any) -> jax.Array:
    """Each element's scale, float32; zeros for a format without scales."""
    if pages.scales is None:
        return jnp.zeros(pages.shape, jnp.float32)
    factors = pages.multipliers()
    for axis, extent in enumerate(pages.block):
        factors = jnp.repeat(factors, extent, axis=axis)
    return factors
