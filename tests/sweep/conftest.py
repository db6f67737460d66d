"""A decoder small enough to sweep in seconds, untrained, and a text for it."""

import json
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from qpaged.cli import main
from qpaged.models import LlamaConfig, init_params, save_checkpoint

SAMPLE = Path(__file__).parent / "sample_results.json"

SIZES = LlamaConfig(
    vocab_size=256,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=64,
)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """The directory of an untrained byte-level model of context 64, its logits far from uniform."""
    directory = tmp_path_factory.mktemp("checkpoint")
    params = init_params(SIZES, jax.random.key(0))
    params["lm_head.weight"] *= 50
    save_checkpoint(directory, SIZES, params)
    return directory


@pytest.fixture(scope="session")
def text_file(tmp_path_factory):
    """1,000 printable bytes."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_bytes(np.random.default_rng(0).integers(32, 127, 1000, np.uint8).tobytes())
    return path


@pytest.fixture
def sweep(checkpoint, text_file, tmp_path, capsys):
    """``sweep(*arguments)`` runs the command on the small model, and returns its status and what it said."""

    def run(*arguments, model=checkpoint, text=text_file):
        out = tmp_path / "out"
        status = main(["sweep", str(model), "--text", str(text), "--out", str(out), *map(str, arguments)])
        said = capsys.readouterr()
        return SimpleNamespace(status=status, out=said.out, err=said.err, directory=out)

    return run


@pytest.fixture
def sample():
    """A sweep's results.json of version 2. Its sizes and its KL means are from a sweep; what they had no
    number for was made up, so that it shows the page and proves nothing about a format."""
    return json.loads(SAMPLE.read_text())
