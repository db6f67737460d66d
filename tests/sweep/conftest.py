"""A decoder small enough to sweep in seconds, untrained, and a text for it."""

import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.small_sweep import SAMPLE, SIZES

import qpaged.sweep
from qpaged.cli import main
from qpaged.models import init_params, save_checkpoint
from qpaged.sweep import Decoder
from qpaged.sweep.measure import Prefilled


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """Return the directory of an untrained byte-level model of context 64, its logits far from uniform."""
    directory = tmp_path_factory.mktemp("checkpoint")
    params = init_params(SIZES, jax.random.key(0))
    params["lm_head.weight"] *= 50
    save_checkpoint(directory, SIZES, params)
    return directory


@pytest.fixture(scope="session")
def text_file(tmp_path_factory):
    """Return the path of 1,000 printable bytes."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_bytes(np.random.default_rng(0).integers(32, 127, 1000, np.uint8).tobytes())
    return path


@pytest.fixture
def command(checkpoint, text_file, tmp_path, capsys):
    """Return ``run(name, *arguments)``, which runs a command on the small model."""

    def run(name, *arguments, model=checkpoint, text=text_file, out="out"):
        given = [model] if model else []
        given += ["--tokenizer", "bytes", "--text", text, "--out", tmp_path / out]
        status = main(list(map(str, [name, *given, *arguments])))
        captured = capsys.readouterr()
        return SimpleNamespace(status=status, out=captured.out, err=captured.err, directory=tmp_path / out)

    return run


@pytest.fixture
def sweep(command):
    """Return ``sweep(*arguments)``: it runs ``qpaged sweep`` on the small model."""
    return lambda *arguments, **paths: command("sweep", *arguments, **paths)


class NoModel(Decoder):
    """A model that takes no time: it allocates caches of its sizes, and predicts all tokens alike."""

    def stream(self, quantizer, settings, sequences):
        return NoStream(self, str(quantizer), super().stream(quantizer, settings, sequences))

    def logits(self, outputs):
        return jnp.zeros((*outputs.shape[:-1], self.vocabulary))

    def attention_profile(self, plain, measured, tokens, settings):
        return super().attention_profile(plain, plain, tokens, settings)


class NoStream:
    """A stream through no model; it notes its format in ``hooks.ran``, and calls ``hooks.before``."""

    def __init__(self, model, spelling, stream):
        self._hooks, self._format = model.hooks, spelling
        self.bytes_per_token, self.dtype = stream.bytes_per_token, stream.dtype

    def begin(self, sequences):
        self._hooks.ran.append(self._format)
        self._hooks.before.get(self._format, lambda: None)()

    def prefill(self, tokens):
        yield Prefilled(slice(0, len(tokens)), slice(0, tokens.shape[1]), jnp.zeros((*tokens.shape, 1)))

    def decode(self, tokens, position):
        return jnp.zeros((len(tokens), 1))


@pytest.fixture
def quick_with_figures(monkeypatch):
    """Make sweeps run without a model.

    ``quick_with_figures.before[format]()`` is called before each batch; ``.ran`` lists the formats of the
    batches.
    """
    hooks, load = SimpleNamespace(before={}, ran=[]), qpaged.sweep.load_model
    monkeypatch.setattr(NoModel, "hooks", hooks, raising=False)

    def load_nothing(*arguments, **options):
        return NoModel(**vars(load(*arguments, **options)))

    monkeypatch.setattr(qpaged.sweep, "load_model", load_nothing)
    return hooks


@pytest.fixture
def quick(quick_with_figures, monkeypatch):
    """Make sweeps run without a model, and without figures, which take longer than all the rest."""
    monkeypatch.setattr(qpaged.sweep, "write_figures", lambda results, directory: [])
    return quick_with_figures


@pytest.fixture
def sample():
    """Return a results.json of version 2.

    Its sizes and KL means are from a sweep. The other numbers are invented: they show the page, and prove
    nothing about a format.
    """
    return json.loads(SAMPLE.read_text())
