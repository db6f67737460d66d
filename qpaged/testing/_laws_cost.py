"""Laws 5 and 6: the memory that a step needs, and the memory that pages take."""

import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

import qpaged
from qpaged._compat import inner_jaxprs, jaxpr_and_consts
from qpaged._platforms import kernel_jaxprs
from qpaged.formats import PoolQuantizer
from qpaged.testing._exact_subject import ExactSubject
from qpaged.testing._law import law
from qpaged.testing._pools import (
    BATCH,
    LARGE_TABLE,
    MANY_PAGES,
    PAGES,
    TOKENS,
    View,
    configuration,
    has_static,
    parts,
    pools,
)
from qpaged.testing._programs import Jaxpr, step_programs
from qpaged.testing._subject import Subject

MEGABYTE = 1_000_000
UTILIZATION = 0.5
BITS_PER_BYTE = 8


def decode_cost(subject: Subject, rows: np.ndarray) -> None:
    """Law 5: a decode write makes no float as large as the pool, takes next to no memory, writes in place."""
    check = law(5, subject)
    program = step_programs(subject).decode
    no_large_floats(subject, program.jaxpr, "a decode write")

    view = subject.enlarged(subject.fresh())
    analysis = program.run.memory_analysis()
    assert analysis is not None  # XLA gives one on every platform that these tests run on
    temporaries = analysis.temp_size_in_bytes
    limit = min(smallest_part(view), MEGABYTE)
    check(temporaries < limit, f"a decode write takes {temporaries:,} bytes, which grow with the pool")

    batch = np.stack([rows] * BATCH, axis=1)
    position = np.stack([np.full(TOKENS, -1, np.int32), np.arange(TOKENS, dtype=np.int32)], axis=1)
    table = np.stack([LARGE_TABLE] * BATCH)
    donated = buffer_pointers(view)
    returned = buffer_pointers(subject.decode(view, batch, position, table))
    check(donated == returned, "a decode write of donated pages does not reuse their buffers")


def copy_cost(subject: Subject) -> None:
    """Law 5: ``copy_pages`` of a donated pool takes next to no memory, and copies in place."""
    check = law(5, subject)
    program = step_programs(subject).copy_pages
    no_large_floats(subject, program.jaxpr, "a copy of pages")
    view = subject.enlarged(subject.fresh())
    analysis = program.run.memory_analysis()
    assert analysis is not None  # XLA has one on every platform that the kit runs on
    temporaries = analysis.temp_size_in_bytes
    limit = min(smallest_part(view), MEGABYTE)
    check(temporaries < limit, f"copying pages takes {temporaries:,} bytes, which grow with the pool")
    donated = buffer_pointers(view)
    source = np.array([LARGE_TABLE[0], 1, 2, 3, MANY_PAGES], np.int32)
    returned = buffer_pointers(program.run(view, source, source[::-1].copy()))
    check(donated == returned, "copying donated pages does not reuse their buffers")


def smallest_part(view: View) -> int:
    """Return the bytes of the smallest array of a view's pages, of which no program needs a copy."""
    return min(
        stored.nbytes
        for _, pages in pools(view)
        for part, stored in parts(pages).items()
        if not has_static(pages, part)
    )


def buffer_pointers(view: View) -> list[int]:
    """Return the address of each array of a view."""
    return [part.unsafe_buffer_pointer() for part in jax.tree_util.tree_leaves(view)]


def attention_cost(subject: Subject) -> None:
    """Law 5: attention makes no float of the pool's size, on any backend."""
    no_large_floats(subject, step_programs(subject).attend.jaxpr, "attention")


def no_large_floats(subject: Subject | ExactSubject, jaxpr: Jaxpr, step: str) -> None:
    """Check that no float array in a program is a quarter of the large pool or more."""
    size = math.prod(configuration(subject.quantizer, MANY_PAGES).pool_shape)
    for primitive, aval in arrays_in(jaxpr):
        small = aval.size < size // 4 or not jnp.issubdtype(aval.dtype, jnp.floating)
        law(5, subject)(
            small, f"{step} makes a float as large as the pool: {aval.str_short()} by {primitive}"
        )


def arrays_in(jaxpr: Jaxpr) -> Iterator[tuple[str, jax.core.ShapedArray]]:
    """Yield (primitive, aval) of every array that a jaxpr makes, those of inner jaxprs included."""
    for equation in jaxpr.eqns:
        for variable in equation.outvars:
            if hasattr(variable.aval, "dtype"):
                yield equation.primitive.name, variable.aval
        for inner in (*inner_jaxprs(equation), *kernel_jaxprs(equation)):
            yield from arrays_in(jaxpr_and_consts(inner)[0])


def truth(subject: Subject) -> None:
    """Law 6: a budget buys the pages that are allocated in it, byte for byte."""
    check = law(6, subject)
    quantizer = subject.quantizer
    config = configuration(quantizer)
    pool = jax.eval_shape(lambda: quantizer.empty(config.pool_shape, jnp.float32))
    pool_bytes = sum(part.size * part.dtype.itemsize for part in jax.tree_util.tree_leaves(pool))
    needed = 2 * pool_bytes  # keys and values
    for room, pages in ((needed - 1, PAGES - 1), (needed, PAGES)):
        planned = budgeted(quantizer, config, int(room / UTILIZATION))
        check(
            planned.num_pages_per_layer == pages,
            f"{PAGES} pages take {needed:,} bytes, but {room:,} are planned to hold "
            f"{planned.num_pages_per_layer}",
        )
    cache = qpaged.PagedAttentionCache.init_cache(None, jnp.float32, planned, None, quantizer)
    allocated = sum(part.nbytes for part in jax.tree_util.tree_leaves(cache))
    check(allocated == needed, f"{allocated:,} bytes are allocated where {needed:,} were planned")
    check(allocated == cache.nbytes, f"{allocated:,} bytes are allocated where {cache.nbytes:,} are reported")


def budgeted(
    quantizer: PoolQuantizer, config: qpaged.PagedAttentionCacheMetaData, memory: int
) -> qpaged.PagedAttentionCacheMetaData:
    """Return the configuration that ``memory`` bytes buy at half utilization."""
    return qpaged.PagedAttentionCacheMetaData.create(
        None,
        config.batch_size,
        1,
        config.max_sequences,
        config.page_size,
        config.num_kv_heads,
        config.kv_head_dim_size,
        UTILIZATION,
        jnp.float32,
        quantizer=quantizer,
        memory_bytes=memory,
    )


def bits(subject: Subject) -> None:
    """Law 6: codes take the bits, and scales the dtypes, that the format states."""
    check = law(6, subject)
    quantizer = subject.quantizer
    for name, pages in pools(subject.fresh()):
        stored = parts(pages)
        stated = quantizer.bits
        if quantizer.scale_dtype is None:  # codes are then the values themselves, in the pool's dtype
            stated = BITS_PER_BYTE * np.dtype(pages.dtype).itemsize
        measured = BITS_PER_BYTE * stored["codes"].nbytes / pages.size
        check(
            measured == stated,
            f"codes of {name} take {measured:g} bits an element where bits says {stated}",
        )
        global_dtype = None if quantizer.global_scale is None else quantizer.global_scale.dtype
        for part, dtype in (("scales", quantizer.scale_dtype), ("global_scale", global_dtype)):
            stored_dtype = stored[part].dtype if part in stored else None
            stated_dtype = None if dtype is None else jnp.dtype(dtype)
            check(
                stored_dtype == stated_dtype,
                f"{part} of {name} have dtype {stored_dtype} where the format says {dtype}",
            )
        if 0 < quantizer.bits < BITS_PER_BYTE:
            codes_fit_bits(subject)
        if quantizer.scale_dtype is not None:
            block = quantizer.block(pages.shape)
            scales = stored["scales"]
            check(
                scales.size * math.prod(block) == pages.size,
                f"{name} have {scales.shape} scales, not one for each block of {block}",
            )


def codes_fit_bits(subject: Subject) -> None:
    """Law 6: every code that ``encode`` gives fits into the bits that are packed of it."""
    quantizer = subject.quantizer
    lowest, highest = -(2 ** (quantizer.bits - 1)), 2**quantizer.bits - 1
    values = np.concatenate([np.linspace(-300, 300, 4801), [-1e30, 1e30]]).astype(np.float32)
    # Of blocks of three scales: values far beyond a block's extremes must be clipped, too.
    of_blocks = []
    for absmax in (0.5, 8.0, 200.0):
        scale = quantizer.fit(-jnp.float32(absmax)[None], jnp.float32(absmax)[None])
        of_blocks.append(np.asarray(quantizer.encode_under(jnp.asarray(values), scale)).astype(np.int32))
    codes = np.concatenate(of_blocks)
    # Packing keeps the low bits alone: codes may be signed or unsigned, but not both.
    law(6, subject)(
        lowest <= codes.min() and codes.max() <= highest and codes.max() - codes.min() <= highest,
        f"encode gives codes {codes.min()} to {codes.max()}, of which {quantizer.bits} bits hold "
        f"{highest + 1} in a row; clip them",
    )
