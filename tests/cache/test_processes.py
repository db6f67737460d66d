"""A mesh over several processes, which talk over loopback: the same bits as on one device."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import pytest

if not hasattr(jax, "shard_map"):
    pytest.skip("this JAX has no jax.shard_map", allow_module_level=True)

TESTS = Path(__file__).parents[1]


def free_port():
    with socket.socket() as opened:
        opened.bind(("localhost", 0))
        return opened.getsockname()[1]


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.long)])
def test_writes_attention_resets_and_files_are_those_of_one_process(count, tmp_path):
    port = free_port()
    path = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "support.processes", str(number), str(count), str(port), str(tmp_path)],
            env={**os.environ, "PYTHONPATH": path, "XLA_FLAGS": ""},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for number in range(count)
    ]
    try:
        said = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, text in zip(processes, said, strict=True):
        assert process.returncode == 0 and "the same" in text, text[-3000:]
