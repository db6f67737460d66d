"""Laws 5 and 6: what a step takes, and what pages take."""

import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import qpaged
from qpaged.testing._law import law
from qpaged.testing._pool import BATCH, ELSEWHERE, MANY_PAGES, PAGES, TOKENS, configuration, parts, pools
from qpaged.testing._programs import of_steps
from qpaged.testing._subject import Subject

MEGABYTE = 1_000_000
UTILIZATION = 0.5
BYTE = 8


def decode_cost(subject: Subject, rows: np.ndarray) -> None:
    """Law 5: a decode write makes no float as large as the pool, takes next to no memory, writes in place."""
    keeps = law(5, subject)
    batch = np.stack([rows] * BATCH, axis=1)
    position = np.stack([np.full(TOKENS, -1, np.int32), np.arange(TOKENS, dtype=np.int32)], axis=1)
    table = np.stack([ELSEWHERE] * BATCH)
    program = of_steps(subject).decode
    no_large_floats(subject, program.jaxpr, "a decode write")

    view = subject.enlarged(subject.fresh())
    least = min(part.nbytes for _, pages in pools(view) for part in parts(pages).values())
    taken = program.run.memory_analysis().temp_size_in_bytes
    keeps(taken < min(least, MEGABYTE), f"a decode write takes {taken:,} bytes, which grow with the pool")

    before = [part.unsafe_buffer_pointer() for part in jax.tree_util.tree_leaves(view)]
    after = jax.tree_util.tree_leaves(subject.decode(view, batch, position, table))
    in_place = before == [part.unsafe_buffer_pointer() for part in after]
    keeps(in_place, "a decode write of donated pages does not reuse their buffers")


def attention_cost(subject: Subject) -> None:
    """Law 5: attention makes no float of the pool's size, on any backend."""
    no_large_floats(subject, of_steps(subject).attend.jaxpr, "attention")


def no_large_floats(subject: Subject, jaxpr: Any, step: str) -> None:
    """No float array in a program is a quarter of the large pool or more."""
    size = math.prod(configuration(subject.quantizer, MANY_PAGES).pool_shape)
    for primitive, aval in arrays_in(jaxpr):
        small = aval.size < size // 4 or not jnp.issubdtype(aval.dtype, jnp.floating)
        law(5, subject)(
            small, f"{step} makes a float as large as the pool: {aval.str_short()} by {primitive}"
        )


def arrays_in(jaxpr: Any) -> Iterator[tuple[str, Any]]:
    """Every array that a jaxpr makes, those of the jaxprs inside it included."""
    for equation in jaxpr.eqns:
        yield from (
            (equation.primitive.name, var.aval) for var in equation.outvars if hasattr(var.aval, "dtype")
        )
        for inner in jax.tree_util.tree_leaves(list(equation.params.values()), is_leaf=is_jaxpr):
            if is_jaxpr(inner):
                yield from arrays_in(getattr(inner, "jaxpr", inner))


def is_jaxpr(value: Any) -> bool:
    return hasattr(value, "eqns")


def truth(subject: Subject) -> None:
    """Law 6: a budget buys the pages that are allocated in it, byte for byte."""
    keeps = law(6, subject)
    quantizer, config = subject.quantizer, configuration(subject.quantizer)
    pool = jax.eval_shape(lambda: quantizer.empty(config.pool_shape, jnp.float32))
    needed = 2 * sum(part.size * part.dtype.itemsize for part in jax.tree_util.tree_leaves(pool))
    for room, pages in ((needed - 1, PAGES - 1), (needed, PAGES)):
        planned = budgeted(quantizer, config, int(room / UTILIZATION))
        found = planned.num_pages_per_layer
        keeps(
            found == pages, f"{PAGES} pages take {needed:,} bytes, but {room:,} are planned to hold {found}"
        )
    cache = qpaged.PagedAttentionCache.init_cache(None, jnp.float32, planned, None, quantizer)
    allocated = sum(part.nbytes for part in jax.tree_util.tree_leaves(cache))
    keeps(allocated == needed, f"{allocated:,} bytes are allocated where {needed:,} were planned")
    keeps(allocated == cache.nbytes, f"{allocated:,} bytes are allocated where {cache.nbytes:,} are reported")


def budgeted(quantizer: qpaged.Quantizer, config: Any, memory: int) -> Any:
    """The configuration of a cache that takes half of so much memory."""
    return qpaged.PagedAttentionCacheMetaData.create(
        None, config.batch_size, 1, TOKENS, config.page_size, config.num_kv_heads, config.kv_head_dim_size,
        UTILIZATION, jnp.float32, quantizer=quantizer, memory_bytes=memory,
    )  # fmt: skip


def bits(subject: Subject) -> None:
    """Law 6: codes take the bits, and scales the dtypes, that the format says they do."""
    keeps, quantizer = law(6, subject), subject.quantizer
    for name, pages in pools(subject.fresh()):
        stored = parts(pages)
        scaled = quantizer.scale_dtype is not None
        said = quantizer.bits if scaled else BYTE * np.dtype(pages.dtype).itemsize
        measured = BYTE * stored["codes"].nbytes / pages.size
        keeps(measured == said, f"codes of {name} take {measured:g} bits an element where bits says {said}")
        for part, dtype in (("scales", quantizer.scale_dtype), ("outer", quantizer.outer_dtype)):
            has = stored[part].dtype if part in stored else None
            same = has == (None if dtype is None else jnp.dtype(dtype))
            keeps(same, f"{part} of {name} have dtype {has} where the format says {dtype}")
        block = quantizer.block(pages.shape)
        each = not scaled or stored["scales"].size * math.prod(block) == pages.size
        keeps(
            each, f"{name} have {scaled and stored['scales'].shape} scales, not one for each block of {block}"
        )
