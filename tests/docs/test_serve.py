"""docs/examples/serve.py: its texts do not depend on who else is served, nor on how little memory it has."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

import qpaged
from qpaged import models

SERVE = Path(__file__).parents[2] / "docs" / "examples" / "serve.py"
HEADER = 'def read_lines(path, mode="r"):\n    """Return '
PROMPTS = [f"{HEADER}{what}".encode() for what in ("all lines", "the first", "a list")] + [
    b"import os\nimport ",
    b"class A",
]


@pytest.fixture(scope="module")
def serve():
    spec = importlib.util.spec_from_file_location("serve", SERVE)
    module = importlib.util.module_from_spec(spec)
    sys.modules["serve"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["serve"]


@pytest.fixture(scope="module")
def tiny():
    return models.load_tiny()


def served(serve, tiny, quantizer, memory, rows, prompts=PROMPTS, tokens=40):
    """Return an engine that has served the prompts, and the tokens of each."""
    engine = serve.Engine(*tiny, quantizer, memory, rows, context=128, budget=48)
    requests = [engine.submit(list(prompt), tokens) for prompt in prompts]
    while not all(request.is_done for request in requests):
        engine.step()
    assert engine.allocator.counts().held == 0
    return engine, [request.tokens[request.prompt :] for request in requests]


def test_texts_do_not_depend_on_memory_or_company(serve, tiny):
    alone = [served(serve, tiny, "raw", 2**20, 4, [prompt])[1][0] for prompt in PROMPTS]
    roomy, of_roomy = served(serve, tiny, "raw", 2**22, 4)
    tight, of_tight = served(serve, tiny, "raw", 400_000, 4)
    assert of_roomy == of_tight == alone
    assert roomy.swaps == 0
    assert tight.swaps > 0


def test_prompts_that_begin_alike_share_pages(serve, tiny):
    engine, texts = served(serve, tiny, "raw", 2**21, rows=1)
    assert engine.allocator.counts().matched == 2 * (len(HEADER) // 16) * 16
    assert texts == served(serve, tiny, "raw", 2**22, rows=4)[1]


def test_the_command(serve, monkeypatch, capsys, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("import os\nclass Reader:\n")
    arguments = ["--prompts", str(prompts), "--tokens", "12", "--format", "int8:token", "--memory", "2"]
    monkeypatch.setattr(sys, "argv", ["serve.py", *arguments, "--context", "128"])
    serve.main()
    printed = capsys.readouterr().out
    assert "int8:token: 15.0 sequences of 128 tokens fit in 2 MiB" in printed
    assert "\n> class Reader:\n" in printed
    assert "24 tokens of 2 prompts" in printed


def test_prompts_that_are_too_long(serve, tiny):
    engine = serve.Engine(*tiny, "raw", 2**20, 2, context=64)
    with pytest.raises(ValueError, match="A prompt must have 1 to 24 tokens, but has 25"):
        engine.submit(np.zeros(25, int), 40)
    with pytest.raises(ValueError, match="but has 0"):
        engine.submit([], 40)


@pytest.mark.long
def test_sequences_on_the_host_give_up_pages_that_they_alone_share(serve, tiny):
    """They hold on to these when they are swapped out, and one that runs may need them."""
    prompts = [bytes(HEADER + "x", "utf-8"), bytes(HEADER + "y", "utf-8")]
    alone = [served(serve, tiny, "raw", 2**22, 1, [prompt], tokens=70)[1][0] for prompt in prompts]
    engine = serve.Engine(*tiny, "raw", 480_000, rows=2, context=128, budget=48)
    first = engine.submit(list(prompts[0]), 70)
    while len(first.tokens) == first.prompt:
        engine.step()
    others = [engine.submit(list(prompt), 70) for prompt in prompts]
    while not all(request.is_done for request in (first, *others)):
        engine.step()
    assert [first.tokens[first.prompt :], *(other.tokens[other.prompt :] for other in others)] == [
        alone[0],
        *alone,
    ]


def test_a_sequence_that_the_whole_cache_cannot_hold(serve, tiny):
    engine = serve.Engine(*tiny, "raw", 130_000, 2, context=128)
    engine.submit([1] * 90, 30)
    with pytest.raises(qpaged.AllocationError, match="more pages"):
        engine.step()
