"""What the laws are checked on: a format, and the way its pages are written."""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

import qpaged
from qpaged.testing._inputs import Chunks
from qpaged.testing._pools import (
    HEADS,
    LARGE_DTYPES,
    LARGE_TABLE,
    MANY_PAGES,
    SMALL_DTYPES,
    TABLE,
    TOKENS,
    View,
    fresh,
    head_dim,
    move_pages,
)
from qpaged.testing._programs import page_programs, step_programs

Reading = dict[str, np.ndarray]
"""What a pool holds of a sequence, as float32 [tokens, heads, head_dim].

``want`` is what should read back, ``values`` what does, ``materialized`` the same in the pool's dtype,
``bound`` the error that the format allows, ``units`` the values over their scales, and ``units_in_bfloat16``
and ``units_in_float16`` the same as attention with such queries reads them; of a format without scales, which
is not decoded there, as floats.
"""


@dataclass(frozen=True)
class Subject:
    """A format under test. A subclass may override a method, to write in another way or to break a law.

    Prefills, resets and copies run on a small pool, with keys in float32 and values in float16; decodes and
    attention run on a pool of 32,768 pages, with values in bfloat16. Values are the keys' negatives.

    Attributes:
        format: a spelling or a quantizer.
    """

    format: str | qpaged.Quantizer

    @functools.cached_property
    def quantizer(self) -> qpaged.Quantizer:
        """The quantizer that ``format`` spells."""
        return qpaged.get_quantizer(self.format)

    @property
    def shape(self) -> tuple[int, int, int]:
        """The shape of a sequence's rows: [tokens, heads, head_dim]."""
        return TOKENS, HEADS, head_dim(self.quantizer)

    def __str__(self) -> str:
        if isinstance(self.format, str):
            return self.format
        return f"{self.format} ({type(self.format).__name__})"

    def fresh(self) -> View:
        """Return a view in which nothing was written."""
        return page_programs(self.quantizer).fresh

    def write(self, view: View, rows: np.ndarray, position: np.ndarray, table: np.ndarray = TABLE) -> View:
        """Return the view after a prefill of ``rows`` [tokens, heads, head_dim]."""
        values = -clip_to_dtype(rows, SMALL_DTYPES[1])
        return page_programs(self.quantizer).write.run(view, rows, values, position, table)

    def reset(self, view: View, pages: np.ndarray) -> View:
        """Return the view after a reset of three pages."""
        return page_programs(self.quantizer).reset.run(view, pages)

    def copied(self, view: View, source: np.ndarray, target: np.ndarray) -> tuple[View, list[jax.Array]]:
        """Return the view after a copy of three pages, and what a program reads from pages past the end."""
        return page_programs(self.quantizer).copy.run(view, source, target)

    def copy_pages(self, view: View, source: np.ndarray, target: np.ndarray) -> View:
        """Return the view after ``copy_pages`` of five pairs of pages."""
        return page_programs(self.quantizer).copy_pages.run(view, source, target)

    def copy_step(self, view: View, source: jax.Array, target: jax.Array) -> View:
        """Return the view after a copy of pages; law 5 traces it over a large view."""
        return view.copy_pages(source, target)

    def decode_step(self, view: View, rows: jax.Array, position: jax.Array, table: jax.Array) -> View:
        """Return the view after one decode step; :meth:`decode` traces it."""
        metadata = qpaged.PagedAttentionMetadata.decode(position=position, page_table=table)
        return view.write_decodes_to_cache(rows, -rows, metadata)

    def decode(self, view: View, rows: np.ndarray, position: np.ndarray, table: np.ndarray) -> View:
        """Donate a large view to decode steps of ``rows`` [steps, batch, heads, head_dim]; return it."""
        return step_programs(self).decode.run(view, rows, position, table)

    def attend_step(
        self, view: View, query: jax.Array, position: jax.Array, table: jax.Array
    ) -> dict[str, jax.Array]:
        """Return decode attention by every backend that runs everywhere; :meth:`attend` traces it."""
        metadata = qpaged.PagedAttentionMetadata.decode(position=position, page_table=table)
        outputs = {}
        for backend in qpaged.attention_backends():
            if backend.platform is None:
                outputs[backend.name] = qpaged.paged_attention(query, view, metadata, backend=backend.name)
        return outputs

    def attend(
        self, view: View, query: np.ndarray, position: np.ndarray, table: np.ndarray
    ) -> dict[str, jax.Array]:
        """Return :meth:`attend_step` over a large view."""
        return step_programs(self).attend.run(view, query, position, table)

    def read(self, view: View, rows: np.ndarray) -> list[Reading]:
        """Return what keys and values hold where ``rows`` were written."""
        programs = page_programs(self.quantizer)
        in_small_dtype = view.value_pages.dtype == SMALL_DTYPES[1]
        program = programs.read_small if in_small_dtype else programs.read_large
        keys = stored_as(rows, view.key_pages.dtype)
        values = stored_as(-rows, view.value_pages.dtype)
        readings = []
        for want, pool in zip((keys, values), program.run(view, TABLE, keys, values), strict=True):
            reading = {name: np.asarray(array) for name, array in pool.items()}
            readings.append(reading | {"want": want})
        return readings

    def prefilled(self, rows: np.ndarray) -> View:
        """Return a fresh view after one prefill of ``rows``."""
        return self.write(self.fresh(), rows, np.arange(TOKENS, dtype=np.int32))

    def in_chunks(self, view: View, rows: np.ndarray, chunks: Chunks) -> View:
        """Return the view after one prefill for each chunk of the tokens of ``rows``."""
        for chunk in chunks:
            # Shorter chunks are padded with rows out of range, so that one program serves all.
            position = np.full(TOKENS, -1, np.int32)
            order = np.zeros(TOKENS, np.int32)
            position[: len(chunk)] = chunk
            order[: len(chunk)] = chunk
            view = self.write(view, rows[order], position)
        return view

    def enlarged(self, view: View) -> View:
        """Return a large view with the keys of a small one at ``LARGE_TABLE``, and with fresh values."""
        values = move_pages(fresh(self.quantizer, LARGE_DTYPES), TABLE, LARGE_TABLE, MANY_PAGES)
        keys = move_pages(view, TABLE, LARGE_TABLE, MANY_PAGES)
        return values.replace(key_pages=keys.key_pages)


def clip_to_dtype(rows: ArrayLike, dtype: DTypeLike) -> np.ndarray:
    """Round float32 to ``dtype`` and back; finite values beyond its range become its largest number."""
    rows = np.asarray(rows)
    largest = float(jnp.finfo(dtype).max)
    clipped = np.where(np.isfinite(rows), np.clip(rows, -largest, largest), rows)
    return clipped.astype(dtype).astype(np.float32)


def stored_as(rows: np.ndarray, dtype: DTypeLike) -> np.ndarray:
    """Return what ``rows`` should read back as: 0 for NaN, the largest finite number for an infinity."""
    largest = float(jnp.finfo(dtype).max)
    return np.nan_to_num(clip_to_dtype(rows, dtype), nan=0.0, posinf=largest, neginf=-largest)
