"""The programs that the laws run, each compiled once for a format."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

import qpaged
from qpaged.implicit import use_implicit_args
from qpaged.pools import format_of
from qpaged.testing._pools import (
    BATCH,
    GROUP,
    HEADS,
    LARGE_DTYPES,
    MANY_PAGES,
    PAGES,
    QUERIES,
    SMALL_DTYPES,
    TABLE,
    TOKENS,
    Pages,
    View,
    fresh,
    head_dim,
)

KEPT = 4  # formats whose programs are cached; tests of one format run one after another

Pytree = Any
Jaxpr = Any  # jax.extend.core.ClosedJaxpr, whose home differs between the versions of JAX

POSITIONS = jax.ShapeDtypeStruct((TOKENS,), jnp.int32)
COPIES = jax.ShapeDtypeStruct((5,), jnp.int32)  # pairs of pages in one call of copy_pages
PAGE_TABLE = jax.ShapeDtypeStruct(TABLE.shape, jnp.int32)


@dataclass(frozen=True)
class Program:
    """A compiled program and its jaxpr."""

    run: jax.stages.Compiled
    jaxpr: Jaxpr


def compile_program(
    function: Callable[..., Any], *arguments: Pytree, donate: tuple[int, ...] = (), optimize: bool = False
) -> Program:
    """Compile ``function`` ahead of time for arguments of these shapes.

    Most of a test's time is compilation, so the compiler optimizes little unless ``optimize`` is set.
    """

    def run(*arguments: Pytree) -> Pytree:
        """Call the function; of this compilation alone, so that JAX's caches drop it with its program."""
        return function(*arguments)

    traced = jax.jit(run, donate_argnums=donate).trace(*arguments)
    options = None if optimize else {"xla_backend_optimization_level": 0}
    return Program(traced.lower().compile(compiler_options=options), traced.jaxpr)


@dataclass(frozen=True)
class PagePrograms:
    """Programs over the pages of a small pool, with keys in float32 and values in float16."""

    quantizer: qpaged.Quantizer

    @cached_property
    def fresh(self) -> View:
        """A view in which nothing was written."""
        return fresh(self.quantizer, SMALL_DTYPES)

    @cached_property
    def write(self) -> Program:
        """A prefill: (view, keys, values, position, table) -> view."""

        def prefill(view, keys, values, position, table):
            metadata = qpaged.PagedAttentionMetadata.prefill(position=position, page_table=table)
            return view.write_prefill_to_cache(keys, values, metadata)

        keys = values = row_shape(self.quantizer)
        return compile_program(prefill, self.fresh, keys, values, POSITIONS, PAGE_TABLE)

    @cached_property
    def reset(self) -> Program:
        """(view, pages) -> view."""
        return compile_program(View.reset_pages, self.fresh, PAGE_TABLE)

    @cached_property
    def copy(self) -> Program:
        """(view, source, target) -> (view, pages past the end), by code that is written for plain pools."""
        return compile_program(_copy_pages, self.fresh, PAGE_TABLE, PAGE_TABLE)

    @cached_property
    def copy_pages(self) -> Program:
        """(view, source, target) -> view, by the view's own method."""
        return compile_program(View.copy_pages, self.fresh, COPIES, COPIES)

    @cached_property
    def read_small(self) -> Program:
        """:func:`_read_program` of the small pool."""
        return _read_program(self.quantizer, SMALL_DTYPES)

    @cached_property
    def read_large(self) -> Program:
        """:func:`_read_program` of pages that were moved out of a large pool."""
        return _read_program(self.quantizer, LARGE_DTYPES)


@dataclass(frozen=True)
class StepPrograms:
    """Steps of a model over a large pool with values in bfloat16; compiling them allocates nothing."""

    subject: Any  # a Subject, whose module imports this one

    @property
    def view(self) -> View:
        """An abstract view of many pages."""
        return jax.eval_shape(lambda: fresh(self.subject.quantizer, LARGE_DTYPES, MANY_PAGES))

    @cached_property
    def decode(self) -> Program:
        """Decode steps as a scan that carries the view: (view, rows, position, table) -> view, in place."""

        def steps(view, rows, position, table):
            def step(view, inputs):
                step_rows, step_position = inputs
                return self.subject.decode_step(view, step_rows, step_position, table), None

            return jax.lax.scan(step, view, (rows, position))[0]

        rows = jax.ShapeDtypeStruct((TOKENS, BATCH, *self.subject.shape[1:]), jnp.float32)
        position = jax.ShapeDtypeStruct((TOKENS, BATCH), jnp.int32)
        table = jax.ShapeDtypeStruct((BATCH, len(TABLE)), jnp.int32)
        # Optimized as models are, while prefills are not: equal bits of both then also show that the
        # compiler's optimizations change none.
        return compile_program(steps, self.view, rows, position, table, donate=(0,), optimize=True)

    @cached_property
    def copy_pages(self) -> Program:
        """A copy of pages within the pool: (view, source, target) -> view, in place."""
        copy = self.subject.copy_step
        return compile_program(copy, self.view, COPIES, COPIES, donate=(0,), optimize=True)

    @cached_property
    def attend(self) -> Program:
        """Decode attention: (view, query, position, table) -> outputs by backend."""
        query = jax.ShapeDtypeStruct((QUERIES, GROUP * HEADS, self.subject.shape[-1]), jnp.float32)
        position = jax.ShapeDtypeStruct((QUERIES,), jnp.int32)
        table = jax.ShapeDtypeStruct((QUERIES, len(TABLE)), jnp.int32)
        return compile_program(self.subject.attend_step, self.view, query, position, table)


@functools.lru_cache(KEPT)
def page_programs(quantizer: qpaged.Quantizer) -> PagePrograms:
    """Return the programs over a format's small pool."""
    return PagePrograms(quantizer)


@functools.lru_cache(KEPT)
def step_programs(subject: Any) -> StepPrograms:
    """Return the programs over a subject's large pool."""
    return StepPrograms(subject)


def row_shape(quantizer: qpaged.Quantizer) -> jax.ShapeDtypeStruct:
    """Return the shape of a sequence's keys: [tokens, heads, head_dim]."""
    return jax.ShapeDtypeStruct((TOKENS, HEADS, head_dim(quantizer)), jnp.float32)


def _copy_pages(view: View, source: ArrayLike, target: ArrayLike) -> tuple[View, list[jax.Array]]:
    @use_implicit_args
    def copy(pool):
        past_end = jnp.take(pool, jnp.array([PAGES]), axis=1, mode="fill")
        return pool.at[:, target].set(pool[:, source]), past_end

    keys, keys_past_end = copy(view.key_pages)
    values, values_past_end = copy(view.value_pages)
    past_end = [_materialized(keys_past_end), _materialized(values_past_end)]
    return view.replace(key_pages=keys, value_pages=values), past_end


def _materialized(pages: Pages) -> jax.Array:
    return pages if format_of(pages) is None else pages.materialize()


def _read_program(quantizer: qpaged.Quantizer, dtypes: tuple[DTypeLike, DTypeLike]) -> Program:
    """Compile the reading of a sequence: (view, table, keys, values) -> :func:`_read_pool` of both pools."""

    def read(view, table, keys, values):
        return [_read_pool(view.key_pages, table, keys), _read_pool(view.value_pages, table, values)]

    view = jax.eval_shape(lambda: fresh(quantizer, dtypes))
    keys = values = row_shape(quantizer)
    return compile_program(read, view, PAGE_TABLE, keys, values)


def _read_pool(pages: Pages, table: jax.Array, want: jax.Array) -> dict[str, jax.Array]:
    """Return what the slots of a sequence hold, and the error that is allowed where ``want`` was written."""

    def slots(pool: jax.Array) -> jax.Array:
        """Return the sequence's slots in order, [tokens, heads, head_dim]."""
        sequence = jnp.moveaxis(jnp.take(pool, table, axis=1), 0, 2)
        return sequence.reshape(-1, *sequence.shape[2:])[: len(want)]

    # Compared outside of the program: within one, XLA may leave out a round trip through a narrow dtype.
    bfloat16, float16 = (jnp.float32,) * 2 if pages.scales is None else (jnp.bfloat16, jnp.float16)
    return {
        "values": slots(pages.dequantize()),
        "materialized": slots(pages.materialize()),
        "bound": pages.quantizer.error_bound(want, slots(element_scales(pages))),
        "units": slots(pages.values(jnp.float32)),
        "units_in_bfloat16": slots(pages.values(bfloat16)),
        "units_in_float16": slots(pages.values(float16)),
    }


def element_scales(pages: Pages) -> jax.Array:
    """Return each element's scale, float32; zeros for a format without scales."""
    if pages.scales is None:
        return jnp.zeros(pages.shape, jnp.float32)
    scales = pages.multipliers()
    for axis, extent in enumerate(pages.block):
        scales = jnp.repeat(scales, extent, axis=axis)
    return scales
