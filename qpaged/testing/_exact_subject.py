"""What the laws of exact pages are checked on: a format, and sequences of which some pages are exact."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from functools import cached_property

import jax
import jax.numpy as jnp
import numpy as np

import qpaged
from qpaged import pools
from qpaged.formats import ExactFormat
from qpaged.pools import ExactPages
from qpaged.testing._pools import (
    GROUP,
    HEADS,
    LARGE_DTYPES,
    MANY_PAGES,
    PAGE_SIZE,
    View,
    configuration,
    has_static,
    head_dim,
    parts,
    with_static_scales,
)
from qpaged.testing._programs import KEPT, Program, compile_program, element_scales
from qpaged.testing._subject import clip_to_dtype

EXACT, SINKS = 9, 3  # tokens
WINDOW, SINK_PAGES = 2, 1  # the same in pages
EXACT_PAGES = 16  # of the small pool; the large one has as many as that of the other laws
LENGTH = 36  # tokens of a sequence on five pages, the last of which is not full
# The last page is in one: what is clamped lands there, and so does -1.
TABLES = np.array([[4, 1, 9, 6, 12], [3, 15, 0, 7, 2]], np.int32)
OTHER_TABLE = np.array([5, 8, 11, 13, 14], np.int32)  # of a third sequence, for which there is no room
SEQUENCES, PAGES_OF_ONE = TABLES.shape
CAPACITY = SEQUENCES * (WINDOW + SINK_PAGES)
KEPT_EXACT = (True, False, False, True, True)  # the pages of a whole sequence that stay as they were written

PoolReading = dict[str, np.ndarray]
"""What a pool holds of a sequence.

``want`` [tokens, heads, head_dim], float32, is what was written, rounded to the pool's dtype, and ``values``
what reads back; ``bound`` is the error that the format allows where pages are packed; ``is_exact`` [pages] is
True of pages that are exact.
"""


@dataclass(frozen=True)
class ExactSubject:
    """A format with exact pages under test. A subclass may override a method, to break a law.

    Keys are in float32, and values, which are their negatives, in bfloat16.

    Attributes:
        format: a spelling or a quantizer, of the packed pages.
    """

    format: str | qpaged.Quantizer

    @cached_property
    def quantizer(self) -> qpaged.Quantizer:
        """The quantizer of the packed pages."""
        return qpaged.get_quantizer(self.format).of_whole_blocks

    @property
    def shape(self) -> tuple[int, int, int]:
        """The shape of a sequence's rows: [tokens, heads, head_dim]."""
        return LENGTH, HEADS, head_dim(self.quantizer)

    @property
    def exact_format(self) -> ExactFormat:
        """The format of the pools."""
        return ExactFormat(self.quantizer, EXACT, SINKS)

    def __str__(self) -> str:
        return str(self.exact_format)

    def fresh(self) -> View:
        """Return a view in which nothing was written."""
        return exact_programs(self.quantizer).fresh

    def write(self, view: View, rows: np.ndarray, position: np.ndarray, table: np.ndarray) -> View:
        """Return the view after a prefill of ``rows`` [tokens, heads, head_dim]."""
        return exact_programs(self.quantizer).write.run(view, rows, values_of(rows), position, table)

    def decode(self, view: View, rows: np.ndarray, position: np.ndarray) -> View:
        """Return the view after decode steps of ``rows`` [steps, sequences, heads, head_dim] at TABLES."""
        return exact_programs(self.quantizer).decode.run(view, rows, values_of(rows), position)

    def reset(self, view: View, pages: np.ndarray) -> View:
        """Return the view after a reset of five pages."""
        return exact_programs(self.quantizer).reset.run(view, pages)

    def pack(self, view: View, pages: np.ndarray, lengths: np.ndarray) -> View:
        """Return the view after ``pack_pages`` of five pages."""
        return exact_programs(self.quantizer).pack.run(view, pages, lengths)

    def copy_pages(self, view: View, source: np.ndarray, target: np.ndarray) -> View:
        """Return the view after ``copy_pages`` of five pairs of pages."""
        return exact_programs(self.quantizer).copy.run(view, source, target)

    def attend(self, view: View, query: np.ndarray, position: np.ndarray) -> dict[str, jax.Array]:
        """Return decode attention of both sequences by every backend that runs everywhere."""
        return exact_programs(self.quantizer).attend.run(view, query, position)

    def in_chunks(self, view: View, rows: np.ndarray, chunks: list[np.ndarray], table: np.ndarray) -> View:
        """Return the view after one prefill for each chunk of the tokens of ``rows``."""
        for chunk in chunks:
            # Shorter chunks are padded with rows out of range, so that one program serves all.
            position = np.full(LENGTH, -1, np.int32)
            order = np.zeros(LENGTH, np.int32)
            position[: len(chunk)] = chunk
            order[: len(chunk)] = chunk
            view = self.write(view, rows[order], position, table)
        return view

    def prefilled(self, rows: np.ndarray, table: np.ndarray) -> View:
        """Return a fresh view after one prefill of ``rows``."""
        return self.in_chunks(self.fresh(), rows, [np.arange(LENGTH)], table)

    def read(self, view: View, rows: np.ndarray, table: np.ndarray) -> dict[str, PoolReading]:
        """Return what keys and values hold where ``rows`` were written."""
        wants = {"keys": rows, "values": values_of(rows)}
        readings = exact_programs(self.quantizer).read.run(view, wants, table)
        return {
            name: {part: np.asarray(array) for part, array in pool.items()} | {"want": wants[name]}
            for name, pool in readings.items()
        }

    def reached(self, view: View, table: np.ndarray) -> dict[str, bytes]:
        """Return every bit that a page table reaches: exact rows, and the parts of packed pages."""
        readings = self.read(view, np.zeros(self.shape, np.float32), table)
        bits = {}
        for name, pages in (("keys", view.key_pages), ("values", view.value_pages)):
            is_exact = readings[name]["is_exact"]
            bits[f"which {name} are exact"] = is_exact.tobytes()
            bits[f"the rows of the {name}"] = readings[name]["values"].tobytes()
            packed = table[~is_exact]
            for part, stored in parts(pools.packed(pages)).items():
                of_packed = stored if has_static(pools.packed(pages), part) else stored[:, packed]
                bits[f"the {part} of packed {name}"] = of_packed.tobytes()
        return bits


@dataclass(frozen=True)
class ExactPrograms:
    """The programs over a format's pools with exact pages."""

    quantizer: qpaged.Quantizer

    @cached_property
    def fresh(self) -> View:
        """A view in which nothing was written."""
        return fresh_exact(self.quantizer, EXACT_PAGES)

    @cached_property
    def write(self) -> Program:
        """A prefill: (view, keys, values, position, table) -> view."""

        def prefill(view, keys, values, position, table):
            metadata = qpaged.PagedAttentionMetadata.prefill(position=position, page_table=table)
            return view.write_prefill_to_cache(keys, values, metadata)

        keys = values = self._rows(LENGTH)
        return compile_program(prefill, self.fresh, keys, values, integers(LENGTH), integers(PAGES_OF_ONE))

    @cached_property
    def decode(self) -> Program:
        """Decode steps as a scan: (view, keys, values, position) -> view."""
        keys = values = self._rows(LENGTH, SEQUENCES)
        return compile_program(decode_steps, self.fresh, keys, values, integers(LENGTH, SEQUENCES))

    @cached_property
    def reset(self) -> Program:
        """(view, pages) -> view."""
        return compile_program(View.reset_pages, self.fresh, integers(PAGES_OF_ONE))

    @cached_property
    def pack(self) -> Program:
        """(view, pages, lengths) -> view."""
        return compile_program(View.pack_pages, self.fresh, integers(PAGES_OF_ONE), integers(PAGES_OF_ONE))

    @cached_property
    def copy(self) -> Program:
        """(view, source, target) -> view."""
        return compile_program(View.copy_pages, self.fresh, integers(PAGES_OF_ONE), integers(PAGES_OF_ONE))

    @cached_property
    def attend(self) -> Program:
        """Decode attention: (view, query, position) -> outputs by backend."""
        query = self._rows(SEQUENCES, heads=GROUP * HEADS)
        return compile_program(attend_step, self.fresh, query, integers(SEQUENCES))

    @cached_property
    def read(self) -> Program:
        """(view, what was written, table) -> what keys and values hold."""

        def read_pool(pool: ExactPages, want: jax.Array, table: jax.Array) -> dict[str, jax.Array]:
            def slots(pages: jax.Array) -> jax.Array:  # [tokens, heads, head_dim]
                sequence = jnp.moveaxis(jnp.take(pages, table, axis=1), 0, 2)
                return sequence.reshape(-1, *sequence.shape[2:])[:LENGTH]

            codes, is_exact = pool.packed(), pool.is_exact(table)
            exact = jnp.moveaxis(pool.gather_slots(table), 0, 1)[:LENGTH].astype(jnp.float32)
            of_exact = jnp.repeat(is_exact, PAGE_SIZE)[:LENGTH, None, None]
            return {
                "values": jnp.where(of_exact, exact, slots(codes.dequantize())),
                "bound": self.quantizer.error_bound(want, slots(element_scales(codes))),
                "is_exact": is_exact,
            }

        def read(view, wants, table):
            pairs = {"keys": view.key_pages, "values": view.value_pages}
            return {name: read_pool(pool, wants[name], table) for name, pool in pairs.items()}

        wants = dict.fromkeys(("keys", "values"), self._rows(LENGTH))
        return compile_program(read, self.fresh, wants, integers(PAGES_OF_ONE))

    @cached_property
    def large_decode(self) -> Program:
        """One decode step over a large pool, in place: (view, keys, values, position) -> view."""
        view = jax.eval_shape(lambda: fresh_exact(self.quantizer, MANY_PAGES))
        keys = values = self._rows(1, SEQUENCES)
        position = integers(1, SEQUENCES)
        return compile_program(decode_steps, view, keys, values, position, donate=(0,), optimize=True)

    @cached_property
    def large_attend(self) -> jax.extend.core.ClosedJaxpr:
        """Decode attention over a large pool, which is not compiled."""
        view = jax.eval_shape(lambda: fresh_exact(self.quantizer, MANY_PAGES))
        query = self._rows(SEQUENCES, heads=GROUP * HEADS)
        return jax.jit(attend_step).trace(view, query, integers(SEQUENCES)).jaxpr

    def _rows(self, *leading: int, heads: int = HEADS) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((*leading, heads, head_dim(self.quantizer)), jnp.float32)


@functools.lru_cache(KEPT)
def exact_programs(quantizer: qpaged.Quantizer) -> ExactPrograms:
    """Return the programs over a format's pools with exact pages."""
    return ExactPrograms(quantizer)


def exact_configuration(quantizer: qpaged.Quantizer, pages: int) -> qpaged.PagedAttentionCacheMetaData:
    """Return the configuration of a one-layer cache of ``pages`` pages, for two sequences."""
    config = configuration(quantizer, pages)
    return config.replace(
        batch_size=SEQUENCES, num_pages_per_sequence=PAGES_OF_ONE, max_sequences=PAGES_OF_ONE * PAGE_SIZE
    )


def fresh_exact(quantizer: qpaged.Quantizer, pages: int) -> View:
    """Return a view with exact pages in which nothing was written."""
    config = exact_configuration(quantizer, pages)
    format = ExactFormat(quantizer, EXACT, SINKS)
    key_view, value_view = (View.init(None, dtype, config, 0, None, format) for dtype in LARGE_DTYPES)
    return with_static_scales(key_view.replace(value_pages=value_view.value_pages))


def decode_steps(view: View, keys: jax.Array, values: jax.Array, position: jax.Array) -> View:
    """Return the view after decode steps of both sequences, a scan that carries the view."""

    def step(view: View, inputs: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[View, None]:
        step_keys, step_values, step_position = inputs
        metadata = qpaged.PagedAttentionMetadata.decode(position=step_position, page_table=TABLES)
        return view.write_decodes_to_cache(step_keys, step_values, metadata), None

    return jax.lax.scan(step, view, (keys, values, position))[0]


def attend_step(view: View, query: jax.Array, position: jax.Array) -> dict[str, jax.Array]:
    """Return decode attention of both sequences by every backend that runs everywhere."""
    metadata = qpaged.PagedAttentionMetadata.decode(position=position, page_table=TABLES)
    return {
        backend.name: qpaged.paged_attention(query, view, metadata, backend=backend.name)
        for backend in qpaged.attention_backends()
        if backend.platform is None
    }


def values_of(rows: np.ndarray) -> np.ndarray:
    """Return the values that are written beside keys: their negatives, as the pool's dtype holds them."""
    return clip_to_dtype(-rows, LARGE_DTYPES[1])


def integers(*shape: int) -> jax.ShapeDtypeStruct:
    """Return the shape of an int32 array."""
    return jax.ShapeDtypeStruct(shape, jnp.int32)
