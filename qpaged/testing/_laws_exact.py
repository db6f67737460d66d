"""The laws with exact pages: recent and first tokens as they were written, and the others packed once."""

import jax
import jax.numpy as jnp
import numpy as np

import qpaged
from qpaged import pools
from qpaged.testing import _exact_subject as sequences
from qpaged.testing._exact_subject import (
    CAPACITY,
    KEPT_EXACT,
    LENGTH,
    OTHER_TABLE,
    PAGES_OF_ONE,
    SEQUENCES,
    TABLES,
    ExactSubject,
    exact_programs,
)
from qpaged.testing._law import law
from qpaged.testing._laws_cost import MEGABYTE, UTILIZATION, budgeted, no_large_floats
from qpaged.testing._laws_sameness import TOLERANCE, float64_attention
from qpaged.testing._laws_travel import registered
from qpaged.testing._pools import GROUP, MANY_PAGES, PAGE_SIZE, SMALLEST, View

FIRST, SECOND = TABLES
TOKENS = np.arange(LENGTH, dtype=np.int32)
PAGE_OF_TOKEN = TOKENS // PAGE_SIZE
NOWHERE = np.array([sequences.EXACT_PAGES, -1, -5, 2**31 - 1, -(2**31)], np.int32)
LOUD = 30  # times as large as what is kept, which a rejected draft may be


def write_order(turn: int) -> tuple[str, list[np.ndarray]]:
    """Return (name, chunks) of one of the ways to write a sequence ascending by page, another each turn."""
    shuffled = [
        np.random.default_rng(turn).permutation(page) for page in np.array_split(TOKENS, [8, 16, 24, 32])
    ]
    orders = {
        "in one prefill": [TOKENS],
        "in chunks": np.split(TOKENS, [5, 12, 13, 30]),
        "in a chunk and token by token": np.split(TOKENS, range(19, LENGTH)),
        "shuffled within pages": [half for page in shuffled for half in np.array_split(page, 2)],
    }
    return list(orders.items())[turn % len(orders)]


def queries(shape: tuple[int, ...]) -> np.ndarray:
    """Return queries [sequences, q_heads, head_dim], float32."""
    _, heads, head_dim = shape
    return np.random.default_rng(1).normal(size=(SEQUENCES, GROUP * heads, head_dim)).astype(np.float32)


def keeps_tokens(subject: ExactSubject, rows: np.ndarray, chunks: list[np.ndarray], case: str) -> None:
    """Law 1: the newest and first pages read as they were written, the others within the format's bound."""
    view = subject.in_chunks(subject.fresh(), rows, chunks, FIRST)
    holds(subject, view, rows, FIRST, KEPT_EXACT, case)


def holds(
    subject: ExactSubject,
    view: View,
    rows: np.ndarray,
    table: np.ndarray,
    exact_pages: tuple[bool, ...] | None,  # None if any may be exact
    case: str,
    number: int = 1,
    names: tuple[str, ...] = ("keys", "values"),
) -> None:
    """Check which pages of a sequence are exact, that they read as written, and others within the bound."""
    check = law(number, subject)
    readings = subject.read(view, rows, table)
    for name in names:
        reading = readings[name]
        is_exact = reading["is_exact"]
        if exact_pages is not None:
            check(
                is_exact.tolist() == list(exact_pages),
                f"{case} leave pages {np.flatnonzero(is_exact).tolist()} of the {name} exact, where "
                f"{np.flatnonzero(exact_pages).tolist()} are to be",
            )
        of_exact = is_exact[PAGE_OF_TOKEN][:, None, None]
        off = np.abs(reading["values"].astype(np.float64) - reading["want"])
        allowed = np.where(of_exact, 0, reading["bound"].astype(np.float64) + SMALLEST)
        worst = np.unravel_index(np.argmax(off - allowed), off.shape)
        check(
            (off <= allowed).all(),
            f"of {case}, {reading['want'][worst]!s} among the {name} reads back as "
            f"{reading['values'][worst]!s}, where an error of {allowed[worst]:.6g} is allowed",
        )


def rewinds(subject: ExactSubject, rows: np.ndarray, later: np.ndarray) -> None:
    """Law 1: a write far behind makes its page exact again, from its codes; leaving it rounds once more."""
    token = PAGE_SIZE + 2  # on a page that is packed
    before = subject.prefilled(rows, FIRST)
    held = subject.read(before, rows, FIRST)["keys"]["values"].copy()
    held[token] = later[token]
    again = subject.in_chunks(before, later, [np.array([token])], FIRST)
    reading = subject.read(again, rows, FIRST)["keys"]
    law(1, subject)(
        reading["is_exact"][token // PAGE_SIZE] and (reading["values"] == held).all(),
        "a write behind the window does not make its page exact with what it held and what was written",
    )
    last = subject.in_chunks(again, rows, [TOKENS[-1:]], FIRST)
    holds(subject, last, held, FIRST, KEPT_EXACT, "a page that was exact again", names=("keys",))


def order(subject: ExactSubject, rows: np.ndarray, chunks: list[np.ndarray], case: str) -> None:
    """Law 2: chunks and single tokens, ascending by page, leave the bits of one prefill."""
    same_bits(
        subject, subject.prefilled(rows, FIRST), subject.in_chunks(subject.fresh(), rows, chunks, FIRST), case
    )


def order_of_decodes(subject: ExactSubject, rows: np.ndarray) -> None:
    """Law 2: decode steps leave the bits of one prefill, also where drafts were written and rejected."""
    expected = subject.prefilled(rows, FIRST)
    both = np.stack([rows, rows[::-1]], axis=1)
    position = np.stack([TOKENS, np.full(LENGTH, -1, np.int32)], axis=1)
    same_bits(subject, expected, subject.decode(subject.fresh(), both, position), "decode steps")
    view = subject.fresh()
    for start in range(0, LENGTH, 4):
        draft = np.arange(start, min(start + sequences.EXACT, LENGTH))
        view = subject.in_chunks(view, rows * LOUD, [draft], FIRST)
        view = subject.in_chunks(view, rows, [np.arange(start, start + 4)], FIRST)
    same_bits(subject, expected, view, "rejected drafts, written again")


def same_bits(subject: ExactSubject, expected: View, view: View, case: str) -> None:
    """Check that two views hold the same bits where the first sequence's table reaches."""
    differing = changed_bits(subject, expected, view, FIRST)
    law(2, subject)(not differing, f"{case} leave other bits than one prefill in {', '.join(differing)}")


def locality(subject: ExactSubject, rows: np.ndarray, other: np.ndarray) -> None:
    """Law 3: a sequence's writes leave another's bits alone; where pages go early, within the bound."""
    before = subject.prefilled(rows, FIRST)
    after = subject.in_chunks(before, other, np.array_split(TOKENS, 7), SECOND)
    changed = changed_bits(subject, before, after, FIRST)
    law(3, subject)(not changed, f"writing one sequence changes another's {', '.join(changed)}")
    crowded = subject.in_chunks(after, rows * 2, np.array_split(TOKENS, 5), OTHER_TABLE)
    each_page_once(subject, crowded, "three sequences with room for two")
    case = "sequences of which some pages were packed early"
    for table, written in ((FIRST, rows), (SECOND, other)):
        holds(subject, crowded, written, table, None, case, number=3)
        for name, reading in subject.read(crowded, written, table).items():
            law(3, subject)(
                reading["is_exact"][0], f"the first page of the {name} is packed early, of {case}"
            )
    holds(subject, crowded, rows * 2, OTHER_TABLE, KEPT_EXACT, f"the newest of {case}", number=3)


def changed_bits(subject: ExactSubject, before: View, after: View, table: np.ndarray) -> list[str]:
    """Return what differs between two views where a table reaches."""
    bits = subject.reached(after, table)
    return [part for part, stored in subject.reached(before, table).items() if stored != bits[part]]


def each_page_once(subject: ExactSubject, view: View, case: str) -> None:
    """Law 9: no page is exact twice, and those that are exact are as many as the pool counts."""
    for name, pages in (("keys", view.key_pages), ("values", view.value_pages)):
        held = np.asarray(pages.page)
        held = held[held < sequences.EXACT_PAGES].tolist()
        law(9, subject)(
            len(set(held)) == len(held) <= CAPACITY,
            f"after {case}, pages {held} of the {name} are exact, of {CAPACITY} that have room",
        )


def totality(subject: ExactSubject, rows: np.ndarray) -> None:
    """Law 4: rows and pages out of range are dropped, and pack nothing."""
    check = law(4, subject)
    view = subject.in_chunks(subject.prefilled(rows, FIRST), rows[::-1].copy(), [TOKENS[:20]], SECOND)
    capacity = PAGES_OF_ONE * PAGE_SIZE
    position = np.resize(np.array([-1, capacity, 2**31 - 1, -(2**31), 2 * capacity], np.int32), LENGTH)
    nothing = {
        "a prefill at positions out of range": subject.write(view, rows * LOUD, position, FIRST),
        "a prefill in pages out of range": subject.write(view, rows * LOUD, TOKENS, NOWHERE),
        "decode steps out of range": subject.decode(
            view, np.stack([rows, rows], axis=1), np.stack([position, position], axis=1)
        ),
        "a reset of pages out of range": subject.reset(view, NOWHERE),
        "packing pages out of range": subject.pack(view, NOWHERE, np.zeros(PAGES_OF_ONE, np.int32)),
        "copying pages out of range": subject.copy_pages(view, FIRST, NOWHERE),
    }
    for case, after in nothing.items():
        for table in TABLES:
            changed = changed_bits(subject, view, after, table)
            check(not changed, f"{case} changes {', '.join(changed)}")


def cost(subject: ExactSubject) -> None:
    """Law 5: a decode step and attention make nothing of the size of the pool, and writes are in place."""
    check = law(5, subject)
    programs = exact_programs(subject.quantizer)
    no_large_floats(subject, programs.large_decode.jaxpr, "a decode write")
    no_large_floats(subject, programs.large_attend, "attention")
    analysis = programs.large_decode.run.memory_analysis()
    assert analysis is not None  # XLA gives one on every platform that these tests run on
    view = sequences.fresh_exact(subject.quantizer, MANY_PAGES)
    stored = jax.tree_util.tree_leaves([pools.packed(view.key_pages), pools.packed(view.value_pages)])
    limit = min(MEGABYTE, *(part.nbytes for part in stored if part.shape[1] == MANY_PAGES))
    temporaries = analysis.temp_size_in_bytes
    check(temporaries < limit, f"a decode write takes {temporaries:,} bytes, which grow with the pool")
    donated = {part.unsafe_buffer_pointer() for part in stored}
    rows = np.zeros((1, SEQUENCES, *subject.shape[1:]), np.float32)
    after = programs.large_decode.run(view, rows, rows, np.zeros((1, SEQUENCES), np.int32))
    returned = {part.unsafe_buffer_pointer() for part in jax.tree_util.tree_leaves(after)}
    check(donated <= returned, "a decode write of donated pages does not reuse their buffers")


def truth(subject: ExactSubject) -> None:
    """Law 6: the bytes of exact pages are planned and reported as they are allocated."""
    check = law(6, subject)
    config = sequences.exact_configuration(subject.quantizer, sequences.EXACT_PAGES)
    memory = 4 * MEGABYTE
    room = int(memory * UTILIZATION)
    planned = budgeted(subject.exact_format, config, memory)
    cache = qpaged.PagedAttentionCache.init_cache(None, jnp.float32, planned, None, subject.exact_format)
    allocated = sum(part.nbytes for part in jax.tree_util.tree_leaves(cache))
    check(allocated == cache.nbytes, f"{allocated:,} bytes are allocated where {cache.nbytes:,} are reported")
    packed = [pools.packed(pages) for pages in (cache.views[0].key_pages, cache.views[0].value_pages)]
    page = sum(part[:, 0].nbytes for part in jax.tree_util.tree_leaves(packed))
    check(
        allocated <= room < allocated + page,
        f"{allocated:,} bytes are allocated in a budget of {room:,}, where a page more takes {page:,}",
    )


def sameness(subject: ExactSubject, rows: np.ndarray, query: np.ndarray) -> None:
    """Law 7: attention over packed and exact pages is attention over what both hold."""
    check = law(7, subject)
    view = subject.in_chunks(subject.prefilled(rows, FIRST), rows[::-1].copy(), [TOKENS[:21]], SECOND)
    position = np.array([LENGTH - 1, 20], np.int32)
    outputs = subject.attend(view, query, position)
    for sequence, table in enumerate(TABLES):
        reading = subject.read(view, rows, table)
        keys, values = (reading[name]["values"] for name in ("keys", "values"))
        one, last = query[sequence : sequence + 1], position[sequence : sequence + 1]
        expected = float64_attention(one, keys, values, last)[0]
        for backend, out in outputs.items():
            off = np.abs(np.asarray(out[sequence]) - expected).max()
            check(
                off <= TOLERANCE * np.abs(values).max(),
                f"attention by {backend} is off by {off:.3g} from attention over the values read back",
            )


def travel(subject: ExactSubject, rows: np.ndarray) -> None:
    """Law 8: a copied page reads as its source does, and so does a view that was saved and packed pages."""
    check = law(8, subject)
    view = subject.prefilled(rows, FIRST)
    for source, target in ((FIRST, SECOND), (FIRST, FIRST[::-1].copy())):
        copied = subject.copy_pages(view, source, target)
        each_page_once(subject, copied, "a copy")
        for name, reading in subject.read(copied, rows, target).items():
            held = subject.read(view, rows, source)[name]
            same = all((reading[part] == held[part]).all() for part in ("is_exact", "values"))
            check(same, f"copying pages {source.tolist()} to {target.tolist()} changes what {name} hold")
    lengths = np.full(PAGES_OF_ONE, PAGE_SIZE, np.int32)
    lengths[-1] = LENGTH % PAGE_SIZE - 1
    kept = rows.copy()
    kept[-1] = 0
    packed = subject.pack(view, FIRST, lengths)
    case = "pages that were packed, one token short,"
    holds(subject, packed, kept, FIRST, (False,) * PAGES_OF_ONE, case, number=8)
    if registered(subject.quantizer):
        changed = changed_bits(subject, view, View.from_json(view.to_json()), FIRST)
        check(not changed, f"a view comes back from JSON with other bits in {', '.join(changed)}")


def reuse(subject: ExactSubject, rows: np.ndarray, later: np.ndarray) -> None:
    """Law 9: pages that were reset are fresh, and what was exact of them has room for others."""
    check = law(9, subject)
    reset = subject.reset(subject.prefilled(rows, FIRST), FIRST)
    zeros = np.zeros_like(rows)
    for name, reading in subject.read(reset, zeros, FIRST).items():
        check(
            not reading["is_exact"].any() and not reading["values"].any(),
            f"{name} that were reset are exact, or read as something else than zeros",
        )
    chunks = np.array_split(TOKENS, 4)
    changed = changed_bits(
        subject,
        subject.in_chunks(subject.fresh(), later, chunks, FIRST),
        subject.in_chunks(reset, later, chunks, FIRST),
        FIRST,
    )
    check(not changed, f"pages that were reset remember what they held in {', '.join(changed)}")
    view = reset
    for table in (SECOND, FIRST):
        view = subject.in_chunks(view, later, chunks, table)
    each_page_once(subject, view, "a sequence that was reset and two that were written")
    for table in TABLES:
        holds(subject, view, later, table, KEPT_EXACT, "sequences in pages that were reset", number=9)
