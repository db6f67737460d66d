"""Law 7: code that takes a cache cannot tell plain pages from quantized ones, but by their precision."""

from typing import Any

import jax
import numpy as np

import qpaged
from qpaged.implicit import ImplicitArray
from qpaged.testing._law import require
from qpaged.testing._pool import ELSEWHERE, HEADS, MANY_PAGES, PAGES, TABLE, TOKENS, configuration, moved, pools
from qpaged.testing._subject import LARGE, Subject, narrowed

GROUP = 2  # query heads of a key/value head
POSITION = np.array([TOKENS - 1, 9, -1], np.int32)  # of the queries; the last row is inactive
TABLES = np.stack([ELSEWHERE] * 3)
TOLERANCE = 2e-5  # of the largest value: float32 sums in another order


def looks(subject: Subject, rows: np.ndarray) -> None:
    """Law 7: pages have the shapes and dtypes of plain ones, and stay what they are through transformations."""
    config = configuration(subject.quantizer)
    for stage, view in (("fresh", subject.fresh()), ("written", subject.prefilled(rows))):
        require(view.metadata == config, 7, subject, f"the metadata of {stage} pages are not those they were made for")
        for (name, pages), dtype in zip(pools(view), (np.float32, np.float16), strict=True):
            plain = np.empty(config.pool_shape, dtype)
            for asked in ("shape", "dtype", "ndim", "size"):
                given, wanted = getattr(pages, asked), getattr(plain, asked)
                what = f"{asked} of {stage} {name} is {given} where a plain pool's is {wanted}"
                require(given == wanted, 7, subject, what)
            right = isinstance(pages, ImplicitArray) and pages.quantizer == subject.quantizer
            require(right, 7, subject, f"{stage} {name} are no implicit arrays of the format any more")
            mapped = jax.eval_shape(jax.vmap(lambda one: stays(one, pages)), pages)  # noqa: B023
            require(
                jax.tree_util.tree_structure(mapped) == jax.tree_util.tree_structure(pages), 7, subject,
                f"{name} that are mapped over their heads come back as something else",
            )  # fmt: skip


def stays(one: Any, pages: Any) -> Any:
    """What vmap gives of pages, if it is these without their heads."""
    same = isinstance(one, qpaged.QuantizedArray) and (one.shape, one.block) == (pages.shape[1:], pages.block[1:])
    return one if same else None


def attention(subject: Subject, rows: np.ndarray, query: np.ndarray) -> None:
    """Law 7: attention over pages is attention over the values they hold, on every backend."""
    rows = narrowed(rows, LARGE[1])
    batch = np.stack([rows, rows], axis=1)
    position = np.stack([np.full(TOKENS, -1, np.int32), np.arange(TOKENS, dtype=np.int32)], axis=1)
    view = subject.decode(subject.enlarged(subject.fresh()), batch, position, TABLES[:2])
    require(
        all(isinstance(pages, qpaged.QuantizedArray) for _, pages in pools(view)), 7, subject,
        "pages that a scan carries come out as something else",
    )  # fmt: skip
    keys, values = subject.read(moved(view, ELSEWHERE, TABLE, PAGES), rows)
    wanted = attended(query, keys["values"], values["values"], POSITION)
    for backend, out in subject.attend(view, query, POSITION, TABLES).items():
        out = np.asarray(out)
        require((out.shape, out.dtype) == (query.shape, query.dtype), 7, subject, f"{backend} gives {out.dtype}{out.shape}")
        off = np.abs(out - wanted).max()
        require(
            off <= TOLERANCE * np.abs(values["values"]).max(), 7, subject,
            f"attention by the backend {backend} is off by {off:.3g} from attention over the values read back; "
            f"decode must be exact and elementwise, transform linear",
        )  # fmt: skip
    require(view.metadata.num_pages_per_layer == MANY_PAGES, 7, subject, "a decode changes the metadata of a view")


def exact_in_bfloat16(subject: Subject, rows: np.ndarray, case: str = "") -> None:
    """Law 7: codes are exact in the dtype of the dot, so that attention in bfloat16 sees what float32 would."""
    view = subject.prefilled(rows)
    for name, found in zip(("keys", "values"), subject.read(view, rows), strict=True):
        what = f"{name} of {case} are not exact in units of the scale when decoded as bfloat16, as dots do"
        require(not found["inexact"].any(), 7, subject, what)


def attended(query: np.ndarray, keys: np.ndarray, values: np.ndarray, position: np.ndarray) -> np.ndarray:
    """Attention of queries (batch, q_heads, head_dim) at ``position`` over slots (tokens, heads, head_dim)."""
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
    return rng.normal(size=(len(POSITION), HEADS * GROUP, shape[-1])).astype(np.float32)
