"""Law 7: code that takes a cache cannot tell plain pages from quantized ones, but by their precision."""

import jax
import numpy as np

from qpaged.implicit import ImplicitArray
from qpaged.pools import format_of
from qpaged.testing._law import law
from qpaged.testing._pools import (
    GROUP,
    HEADS,
    LARGE_DTYPES,
    LARGE_TABLE,
    PAGES,
    QUERIES,
    SMALL_DTYPES,
    TABLE,
    TOKENS,
    Pages,
    View,
    configuration,
    has_static,
    move_pages,
    pools,
    same_structure,
)
from qpaged.testing._subject import Subject, clip_to_dtype

POSITION = np.array([TOKENS - 1, 9, -1], np.int32)  # of the queries; the last row is inactive
TABLES = np.stack([LARGE_TABLE] * QUERIES)
TOLERANCE = 2e-5  # of the largest value: float32 sums in another order


def looks(subject: Subject, rows: np.ndarray) -> None:
    """Law 7: pages have the shapes and dtypes of plain ones, and survive transformations as pages."""
    looks_plain(subject, subject.fresh(), "fresh")
    looks_plain(subject, subject.prefilled(rows), "written")


def looks_plain(subject: Subject, view: View, stage: str) -> None:
    """Check the attributes of a view's pages against those of plain pools."""
    check = law(7, subject)
    config = configuration(subject.quantizer)
    check(view.metadata == config, f"{stage} pages have other metadata than they were made for")
    for (name, pages), dtype in zip(pools(view), SMALL_DTYPES, strict=True):
        plain = np.empty(config.pool_shape, dtype)
        for attribute in ("shape", "dtype", "ndim", "size"):
            value = getattr(pages, attribute)
            expected = getattr(plain, attribute)
            check(
                value == expected,
                f"{attribute} of {stage} {name} is {value} where a plain pool's is {expected}",
            )
        of_format = format_of(pages) == subject.quantizer
        check(of_format and isinstance(pages, ImplicitArray), f"{stage} {name} are no arrays of the format")
        heads_share_scales = has_static(pages, "scales") and pages.scales.shape[0] == 1  # one for all heads
        check(
            heads_share_scales or survives_vmap(pages),
            f"{name} do not come through vmap over their heads as what they are",
        )


def survives_vmap(pages: Pages) -> bool:
    """Return True if vmap over the heads sees pages without their heads axis, and returns pages."""
    shapes_agree = []

    def identity(head: Pages) -> Pages:
        shapes_agree.append((head.shape, head.block) == (pages.shape[1:], pages.block[1:]))
        return head

    mapped = jax.eval_shape(jax.vmap(identity), pages)
    return all(shapes_agree) and same_structure(mapped, pages)


def attention(subject: Subject, rows: np.ndarray, query: np.ndarray) -> None:
    """Law 7: attention over pages is attention over the values they hold, on every backend."""
    check = law(7, subject)
    rows = clip_to_dtype(rows, LARGE_DTYPES[1])
    view = decoded_sequence(subject, rows)
    still_pages = all(format_of(pages) is not None for _, pages in pools(view))
    check(still_pages, "pages that a scan carries come out as something else")

    keys, values = subject.read(move_pages(view, LARGE_TABLE, TABLE, PAGES), rows)
    expected = float64_attention(query, keys["values"], values["values"], POSITION)
    tolerance = TOLERANCE * np.abs(values["values"]).max()
    for backend, out in subject.attend(view, query, POSITION, TABLES).items():
        same_type = out.shape == query.shape and out.dtype == query.dtype
        check(same_type, f"attention by {backend} gives {out.dtype} of shape {out.shape}")
        off = np.abs(np.asarray(out) - expected).max()
        check(
            off <= tolerance,
            f"attention by {backend} is off by {off:.3g} from attention over the values read back (is "
            f"decode elementwise, and exact in every dtype? is transform linear, and inverse its inverse?)",
        )


def decoded_sequence(subject: Subject, rows: np.ndarray) -> View:
    """Return a large view to which decode steps wrote ``rows``, beside an inactive row."""
    batch = np.stack([rows, rows], axis=1)
    position = np.stack([np.full(TOKENS, -1, np.int32), np.arange(TOKENS, dtype=np.int32)], axis=1)
    return subject.decode(subject.enlarged(subject.fresh()), batch, position, TABLES[:2])


def exact_in_queries_dtypes(subject: Subject, rows: np.ndarray, case: str = "rows") -> None:
    """Law 7: codes are exact in the dtype of a query, so that its dots see what float32 would."""
    view = subject.prefilled(rows)
    for (name, _), reading in zip(pools(view), subject.read(view, rows), strict=True):
        for dtype in ("bfloat16", "float16"):
            is_exact = reading["units"] == reading[f"units_in_{dtype}"].astype(np.float32)
            law(7, subject)(
                is_exact.all(),
                f"{name} of {case}, in units of their scales, are not exact in {dtype}, as dots ask",
            )


def float64_attention(
    query: np.ndarray,  # [queries, q_heads, head_dim]
    keys: np.ndarray,  # [tokens, heads, head_dim]
    values: np.ndarray,
    position: np.ndarray,  # [queries]
) -> np.ndarray:
    """Return the attention of each query to the tokens up to its position; zeros for inactive rows."""
    out = np.zeros(query.shape)
    for row, last in enumerate(position):
        if last < 0:
            continue
        for head in range(query.shape[1]):
            visible_keys = keys[: last + 1, head // GROUP].astype(np.float64)
            visible_values = values[: last + 1, head // GROUP].astype(np.float64)
            scores = visible_keys @ query[row, head].astype(np.float64) / np.sqrt(query.shape[-1])
            weights = np.exp(scores - scores.max())
            out[row, head] = weights @ visible_values / weights.sum()
    return out


def queries(shape: tuple[int, int, int]) -> np.ndarray:
    """Return Gaussian queries [queries, q_heads, head_dim] for rows of a shape, float32."""
    rng = np.random.default_rng(0)
    return rng.normal(size=(QUERIES, HEADS * GROUP, shape[-1])).astype(np.float32)
