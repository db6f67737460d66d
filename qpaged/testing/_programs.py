"""The programs that the laws run, compiled once for each format."""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import qpaged
from qpaged.implicit import use_implicit_args
from qpaged.testing._pool import MANY_PAGES, fresh

KEPT = 16  # formats whose programs are kept


@dataclass(frozen=True)
class Program:
    """A compiled program, and what it was compiled from."""

    run: Any
    jaxpr: Any


def compiled(function: Any, *args: Any, donate: tuple[int, ...] = (), quickly: bool = False) -> Program:
    """``function`` compiled ahead for arguments like these; ``quickly`` if its last bits do not matter."""
    traced = jax.jit(function, donate_argnums=donate).trace(*args)
    options = {"xla_backend_optimization_level": 0} if quickly else None
    return Program(traced.lower().compile(compiler_options=options), traced.jaxpr)


write = jax.jit(qpaged.PagedAttentionCacheView.write_prefill_to_cache)
reset = jax.jit(qpaged.PagedAttentionCacheView.reset_pages)
view_like = functools.lru_cache(KEPT)(fresh)


@functools.lru_cache(KEPT)
def decode(subject: Any, dtypes: tuple[Any, Any], rows: Any, position: Any, table: Any) -> Program:
    """Decode steps one after another, the view their carry, on an abstract large pool; arguments by shape."""

    def steps(view, rows, position, table):
        def step(view, now):
            return subject.decode_step(view, *now, table), None

        return jax.lax.scan(step, view, (rows, position))[0]

    return compiled(steps, large(subject.quantizer, dtypes), rows, position, table, donate=(0,))


@functools.lru_cache(KEPT)
def attend(subject: Any, dtypes: tuple[Any, Any], query: Any, position: Any, table: Any) -> Program:
    """Decode attention on every backend, over an abstract large pool; arguments by shape."""

    view = large(subject.quantizer, dtypes)
    return compiled(subject.attend_step, view, query, position, table, quickly=True)


def large(quantizer: qpaged.Quantizer, dtypes: tuple[Any, Any]) -> Any:
    """An abstract view of many pages, none of them allocated."""
    return jax.eval_shape(lambda: fresh(quantizer, dtypes, MANY_PAGES))


def like(*arrays: np.ndarray) -> tuple[jax.ShapeDtypeStruct, ...]:
    """The shapes and dtypes of arrays."""
    return tuple(jax.ShapeDtypeStruct(array.shape, array.dtype) for array in arrays)


@functools.lru_cache(KEPT)
def read(quantizer: qpaged.Quantizer, dtypes: tuple[Any, Any], table: Any, keys: Any, values: Any) -> Program:
    """What a sequence's slots hold, and what is allowed for ``keys`` and ``values``; arguments by shape."""

    def both(view, table, keys, values):
        wanted = (view.key_pages, keys), (view.value_pages, values)
        return [_read(pages, table, want) for pages, want in wanted]

    view = jax.eval_shape(lambda: fresh(quantizer, dtypes))
    return compiled(both, view, table, keys, values, quickly=True)


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


@jax.jit
def copied(view: Any, source: Any, target: Any) -> tuple[Any, Any]:
    """The view with pages copied by code for plain ones, and pages past the end as such code reads them."""

    @use_implicit_args
    def copy(keys, values):
        past = jnp.array([keys.shape[1]])
        pools = [pool.at[:, target].set(pool[:, source]) for pool in (keys, values)]
        return pools, [jnp.take(pool, past, axis=1, mode="fill") for pool in (keys, values)]

    (keys, values), past = copy(view.key_pages, view.value_pages)
    plain = [pages.materialize() if isinstance(pages, qpaged.QuantizedArray) else pages for pages in past]
    return view.replace(key_pages=keys, value_pages=values), plain
