"""Law 7: code that takes a cache cannot tell plain pages from quantized ones, but by their precision."""

from typing import Any

import jax
import numpy as np

import qpaged
from qpaged.implicit import ImplicitArray
from qpaged.testing._law import law
from qpaged.testing._pool import (
    ELSEWHERE,
    GROUP,
    HEADS,
    PAGES,
    QUERIES,
    TABLE,
    TOKENS,
    configuration,
    moved,
    pools,
)
from qpaged.testing._subject import LARGE, Subject, narrowed

POSITION = np.array([TOKENS - 1, 9, -1], np.int32)  # of the queries; the last row is inactive
TABLES = np.stack([ELSEWHERE] * QUERIES)
TOLERANCE = 2e-5  # of the largest value: float32 sums in another order


def looks(subject: Subject, rows: np.ndarray) -> None:
    """Law 7: pages have the shapes and dtypes of plain ones, and come through transformations."""
    keeps, config = law(7, subject), configuration(subject.quantizer)
    for stage, view in (("fresh", subject.fresh()), ("written", subject.prefilled(rows))):
        keeps(view.metadata == config, f"{stage} pages have other metadata than they were made for")
        for (name, pages), dtype in zip(pools(view), (np.float32, np.float16), strict=True):
            plain = np.empty(config.pool_shape, dtype)
            for asked in ("shape", "dtype", "ndim", "size"):
                given, wanted = getattr(pages, asked), getattr(plain, asked)
                keeps(
                    given == wanted, f"{asked} of {stage} {name} is {given} where a plain pool's is {wanted}"
                )
            own = isinstance(pages, qpaged.QuantizedArray) and pages.quantizer == subject.quantizer
            keeps(own and isinstance(pages, ImplicitArray), f"{stage} {name} are no arrays of the format")
            keeps(mapped(pages), f"{name} do not come through vmap over their heads as what they are")


def mapped(pages: Any) -> bool:
    """Whether vmap over the heads sees pages without their heads, and gives back pages."""
    seen = []

    def one(head):
        seen.append((head.shape, head.block) == (pages.shape[1:], pages.block[1:]))
        return head

    kinds: list[Any] = [
        jax.tree_util.tree_structure(tree) for tree in (pages, jax.eval_shape(jax.vmap(one), pages))
    ]
    return all(seen) and bool(kinds[0] == kinds[1])


def attention(subject: Subject, rows: np.ndarray, query: np.ndarray) -> None:
    """Law 7: attention over pages is attention over the values they hold, on every backend."""
    keeps, rows = law(7, subject), narrowed(rows, LARGE[1])
    batch = np.stack([rows, rows], axis=1)
    position = np.stack([np.full(TOKENS, -1, np.int32), np.arange(TOKENS, dtype=np.int32)], axis=1)
    view = subject.decode(subject.enlarged(subject.fresh()), batch, position, TABLES[:2])
    kept = all(isinstance(pages, qpaged.QuantizedArray) for _, pages in pools(view))
    keeps(kept, "pages that a scan carries come out as something else")

    keys, values = (found["values"] for found in subject.read(moved(view, ELSEWHERE, TABLE, PAGES), rows))
    wanted, tolerance = attended(query, keys, values, POSITION), TOLERANCE * np.abs(values).max()
    for backend, out in subject.attend(view, query, POSITION, TABLES).items():
        same = (out.shape, out.dtype) == (query.shape, query.dtype)
        keeps(same, f"attention by {backend} gives {out.dtype} of shape {out.shape}")
        off = np.abs(np.asarray(out) - wanted).max()
        keeps(
            off <= tolerance,
            f"attention by {backend} is off by {off:.3g} from attention over the values read back (is "
            f"decode elementwise, and exact in every dtype? is transform linear, and inverse its inverse?)",
        )


def exact_in_bfloat16(subject: Subject, rows: np.ndarray, case: str = "rows") -> None:
    """Law 7: codes are exact in the dtype of a dot, so that bfloat16 attention sees what float32 would."""
    view = subject.prefilled(rows)
    for (name, _), found in zip(pools(view), subject.read(view, rows), strict=True):
        exact = not found["inexact"].any()
        law(7, subject)(
            exact, f"{name} of {case}, in units of their scales, are not exact in bfloat16, as dots ask"
        )


def attended(query: np.ndarray, keys: np.ndarray, values: np.ndarray, position: np.ndarray) -> np.ndarray:
    """Attention of (batch, q_heads, head_dim) at ``position`` over slots (tokens, heads, head_dim)."""
    out = np.zeros(query.shape)
    for row, last in enumerate(position):
        for head in range(query.shape[1]):
            k, v = (slots[: last + 1, head // GROUP].astype(np.float64) for slots in (keys, values))
            scores = k @ query[row, head].astype(np.float64) / np.sqrt(query.shape[-1])
            weights = np.exp(scores - scores.max(initial=-np.inf)) if last >= 0 else scores
            out[row, head] = weights @ v / max(weights.sum(), 1)
    return out


def queries(shape: tuple[int, int, int]) -> np.ndarray:
    """(batch, q_heads, head_dim) float32 for rows (tokens, heads, head_dim)."""
    rng = np.random.default_rng(0)
    return rng.normal(size=(QUERIES, HEADS * GROUP, shape[-1])).astype(np.float32)
