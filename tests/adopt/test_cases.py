"""The promises about adopted models hold for those that the benchmarks measure."""

import importlib

import jax
import pytest
from support.packages import require_packages

require_packages("flax", "transformers", "penzai")

from adopted._measure import measure

with jax.numpy_dtype_promotion("standard"):
    CASES = [
        case
        for group in ("flax_attention", "huggingface", "penzai")
        for case in importlib.import_module(f"adopted.{group}").cases()
    ]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_an_adopted_model_keeps_the_promises(case):
    (result,) = measure(case, ["int8"], rounds=0)
    assert result.full_size_floats == 0
    assert result.materialized == 0
    assert result.compilations == 1
    assert result.same_type
    assert result.buffers_reused
    assert result.ratio_bfloat16 <= 0.52
    assert result.ratio <= 0.26
    assert result.kl_mean < 1e-3
    assert result.kl_padded is None or result.kl_padded < 1e-3
