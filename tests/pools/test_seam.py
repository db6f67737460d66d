"""The pool seam: one place knows the kinds of pool, and a new kind is one file."""

import ast
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from support.pool_kinds import CodesWithCopy

import qpaged
from qpaged import interop, pools
from qpaged.attention import _gpu

ROOT = Path(qpaged.__file__).parent
KNOWING = ("arrays", "pools")
CONFIG = qpaged.PagedAttentionCacheMetaData(2, 1, 8, 4, 64, 16, 2, 32, 0.5)
TABLE = np.array([[3, 0, 8, 8], [5, 1, 2, 8]])


def type_questions(path):
    """Return the lines of a file that ask whether something is a QuantizedArray."""
    lines = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "isinstance":
            names = {getattr(part, "id", getattr(part, "attr", None)) for part in ast.walk(node.args[1])}
            if "QuantizedArray" in names:
                lines.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    return lines


def test_only_arrays_and_pools_ask_for_a_quantized_array_by_type():
    questions = []
    for path in ROOT.rglob("*.py"):
        if path.relative_to(ROOT).parts[0] not in KNOWING:
            questions += type_questions(path)
    assert questions == []


def test_the_seam_itself_asks():
    assert any(type_questions(path) for path in (ROOT / "pools").glob("*.py"))


@pytest.fixture
def view():
    """Return a view of a kind of pool that this package does not know."""
    return qpaged.PagedAttentionCacheView.init(None, jnp.float32, CONFIG, 0, quantizer=CodesWithCopy.of)


def rows(count, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(count, 2, 32)), jnp.float32)


def written(view):
    """Return a view in which two sequences of 20 and 40 tokens were written."""
    for row, count in enumerate((20, 40)):
        step = qpaged.PagedAttentionMetadata.prefill(position=np.arange(count), page_table=TABLE[row])
        view = view.write_prefill_to_cache(rows(count, row), -rows(count, row), step)
    return view


@pytest.mark.parametrize("backend", ["xla", "reference"])
def test_attention_reads_a_new_kind(view, backend):
    plain = qpaged.PagedAttentionCacheView.init(None, jnp.float32, CONFIG, 0)
    query = rows(2, 7)
    step = qpaged.PagedAttentionMetadata.decode(position=[19, 39], page_table=TABLE)
    out = qpaged.paged_attention(query, written(view), step, backend=backend)
    want = qpaged.paged_attention(query, written(plain), step, backend=backend)
    np.testing.assert_allclose(out, want, rtol=1e-5, atol=1e-5)


def test_kernels_decline_a_new_kind(view):
    step = qpaged.PagedAttentionMetadata.decode(position=[19, 39], page_table=TABLE)
    tpu, gpu, *_ = qpaged.attention_backends(rows(2), view, step)
    assert not tpu.available and not gpu.available
    assert _gpu._pool_refusal(view.key_pages) == "pages of type CodesWithCopy are not taken"


def test_pages_of_a_new_kind_are_handed_on(view):
    plain = qpaged.PagedAttentionCacheView.init(None, jnp.float32, CONFIG, 0)
    pages = interop.interleaved_pages(written(view))
    np.testing.assert_array_equal(pages, interop.interleaved_pages(written(plain)))


def test_pages_of_a_new_kind_are_copied_and_cleared(view):
    before = written(view)
    after = before.copy_pages([5, 3], [6, 7])
    for pool, old in ((after.key_pages, before.key_pages), (after.value_pages, before.value_pages)):
        np.testing.assert_array_equal(pool.codes.codes[:, [6, 7]], old.codes.codes[:, [5, 3]])
        np.testing.assert_array_equal(pool.codes.scales[:, [6, 7]], old.codes.scales[:, [5, 3]])
        np.testing.assert_array_equal(pool.copy[:, [6, 7]], old.copy[:, [5, 3]])
    fresh = after.reset_pages(np.arange(8))
    for leaf in (fresh.key_pages.codes.codes, fresh.key_pages.codes.scales, fresh.key_pages.copy):
        assert not np.any(leaf)


def test_bytes_of_a_new_kind_are_counted(view):
    counted = pools.count_bytes(view.key_pages)
    float_copy, codes = 4 * 2 * 8 * 16 * 32, 2 * 8 * 16 * 32
    assert counted.total == float_copy + codes + 2 * 8  # a scale byte for each page of a head
