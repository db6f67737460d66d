"""What the laws are checked on: a format, and the way its pages are written."""

import functools
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

import qpaged
from qpaged.testing._pool import ELSEWHERE, HEADS, MANY_PAGES, TABLE, TOKENS, fresh, head_dim, moved
from qpaged.testing._programs import LARGE, SMALL, of_pages, of_steps


@dataclass(frozen=True)
class Subject:
    """A format under test. A subclass may override a method, to write in another way or to break a law.

    Pages are of a small pool, keys in float32 and values in float16; decodes and attention run on a pool of
    32,768 pages, values in bfloat16. Values are the keys' negatives.

    Attributes:
        format: a spelling or a quantizer.
    """

    format: Any

    @functools.cached_property
    def quantizer(self) -> qpaged.Quantizer:
        return qpaged.get_quantizer(self.format)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of the rows of a sequence: (tokens, heads, head_dim)."""
        return TOKENS, HEADS, head_dim(self.quantizer)

    def __str__(self) -> str:
        return (
            self.format if isinstance(self.format, str) else f"{self.format} ({type(self.format).__name__})"
        )

    def fresh(self) -> Any:
        """A view in which nothing was written."""
        return of_pages(self.quantizer).fresh

    def write(self, view: Any, rows: np.ndarray, position: np.ndarray, table: np.ndarray = TABLE) -> Any:
        """The view after a prefill of ``rows`` (tokens, heads, head_dim)."""
        return of_pages(self.quantizer).write.run(view, rows, -narrowed(rows, SMALL[1]), position, table)

    def reset(self, view: Any, pages: np.ndarray) -> Any:
        """The view with these three pages reset."""
        return of_pages(self.quantizer).reset.run(view, pages)

    def copied(self, view: Any, source: np.ndarray, target: np.ndarray) -> Any:
        """The view with three pages copied; and pages past the end, as a program reads them."""
        return of_pages(self.quantizer).copy.run(view, source, target)

    def decode_step(self, view: Any, rows: Any, position: Any, table: Any) -> Any:
        """The view after one decode step; traced into :meth:`decode`."""
        metadata = qpaged.PagedAttentionMetadata.decode(position=position, page_table=table)
        return view.write_decodes_to_cache(rows, -rows, metadata)

    def decode(self, view: Any, rows: np.ndarray, position: np.ndarray, table: np.ndarray) -> Any:
        """The large view, which is given away, after steps of ``rows`` (steps, batch, heads, head_dim)."""
        return of_steps(self).decode.run(view, rows, position, table)

    def attend_step(self, view: Any, query: Any, position: Any, table: Any) -> dict[str, Any]:
        """Decode attention by the name of the backend; traced into :meth:`attend`."""
        metadata = qpaged.PagedAttentionMetadata.decode(position=position, page_table=table)
        attention = functools.partial(qpaged.paged_attention, query, view, metadata)
        names = [backend.name for backend in qpaged.attention_backends() if backend.platform is None]
        return {name: attention(backend=name) for name in names}

    def attend(self, view: Any, query: np.ndarray, position: np.ndarray, table: np.ndarray) -> Any:
        """What :meth:`attend_step` gives over the large view."""
        return of_steps(self).attend.run(view, query, position, table)

    def read(self, view: Any, rows: np.ndarray) -> list[dict[str, np.ndarray]]:
        """What the slots of keys and of values hold where ``rows`` were written, and what is allowed."""
        wanted = wants(view, rows)
        programs = of_pages(self.quantizer)
        program = programs.read_small if view.value_pages.dtype == SMALL[1] else programs.read_large
        return [
            {"want": want} | {name: np.asarray(array) for name, array in pool.items()}
            for want, pool in zip(wanted, program.run(view, TABLE, *wanted), strict=True)
        ]

    def prefilled(self, rows: np.ndarray) -> Any:
        """A fresh view after one prefill."""
        return self.write(self.fresh(), rows, np.arange(TOKENS, dtype=np.int32))

    def in_chunks(self, view: Any, rows: np.ndarray, chunks: list[np.ndarray]) -> Any:
        """The view after ``rows`` were written chunk by chunk; each chunk is an array of tokens."""
        for chunk in chunks:
            position, order = np.full(TOKENS, -1, np.int32), np.zeros(TOKENS, np.int32)
            position[: len(chunk)] = order[: len(chunk)] = chunk
            view = self.write(view, rows[order], position)
        return view

    def enlarged(self, view: Any) -> Any:
        """A large view that holds the pages of a small one elsewhere, values in another dtype and fresh."""
        values = moved(fresh(self.quantizer, LARGE), TABLE, ELSEWHERE, MANY_PAGES)
        return values.replace(key_pages=moved(view, TABLE, ELSEWHERE, MANY_PAGES).key_pages)


def narrowed(rows: np.ndarray, dtype: Any) -> np.ndarray:
    """``rows``, float32, as ``dtype`` holds them: the largest finite number where they are beyond it."""
    largest = float(jnp.finfo(dtype).max)
    kept = np.where(np.isfinite(rows), np.clip(rows, -largest, largest), rows)
    return kept.astype(dtype).astype(np.float32)


def wants(view: Any, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What keys and values should read back as: 0 for NaN, the largest finite number for an infinity."""
    wanted = [(rows, view.key_pages.dtype)]
    wanted.append((-narrowed(rows, view.value_pages.dtype), view.value_pages.dtype))
    largest = [float(jnp.finfo(dtype).max) for _, dtype in wanted]
    keys, values = (
        np.nan_to_num(x, nan=0.0, posinf=m, neginf=-m) for (x, _), m in zip(wanted, largest, strict=True)
    )
    return keys, values
