"""A model's directory, and the command that plans for it."""

import json

import pytest

from qpaged.cli import main


@pytest.fixture
def model(tmp_path):
    """Return the directory of a configuration without weights."""
    fields = {
        "model_type": "llama", "vocab_size": 64, "hidden_size": 64, "intermediate_size": 64,
        "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64,
        "max_position_embeddings": 512,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(fields))
    return tmp_path


@pytest.fixture
def command(model, capsys):
    """Return ``run(*arguments)``: it plans for the model, and returns status, stdout and stderr."""

    def run(*arguments, of=model):
        status = main(["plan", str(of), *map(str, arguments)])
        return status, *capsys.readouterr()

    return run
