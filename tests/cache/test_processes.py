"""A mesh over several processes, which talk over loopback: the same bits as on one device."""

import jax
import pytest
from support.together import run_together

if not hasattr(jax, "shard_map"):
    pytest.skip("this JAX has no jax.shard_map", allow_module_level=True)


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.long)])
def test_writes_attention_resets_and_files_are_those_of_one_process(count, tmp_path):
    pytest.importorskip("safetensors")
    said = run_together(
        count, lambda port, number: ("-m", "support.processes", number, count, port, tmp_path)
    )
    assert all("the same" in text for text in said)
