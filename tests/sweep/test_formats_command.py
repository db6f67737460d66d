"""Tests of ``qpaged formats``, with the base dependencies only."""

import subprocess
import sys
from importlib.metadata import EntryPoint

import jax
import jax.numpy as jnp

import qpaged
from qpaged.cli import main
from qpaged.formats import _registry
from qpaged.sweep import installed_formats

WITHOUT_EXTRAS = """
import sys
for name in ("rich", "matplotlib", "safetensors"):
    sys.modules[name] = None
from qpaged.cli import main
raise SystemExit(main(["formats"]))
"""


def rows(text):
    return {line.split()[0]: line.split() for line in text.split("\n\n")[0].splitlines()[1:]}


def test_every_installed_format_is_listed(capsys):
    assert main(["formats"]) == 0
    out = capsys.readouterr().out
    listed = rows(out)
    assert tuple(listed) == qpaged.available_formats(packed=True)
    assert "With exact pages alone, as trellis2:channel+exact128: trellis2:channel, trellis3:channel." in out
    assert listed["int8"][1:3] == ["page", "8.004"]
    assert listed["int8:token"][1:3] == ["token", "8.250"]
    assert listed["int8:channel"][1:3] == ["channel", "8.500"]
    assert listed["raw"][1:3] == ["element", "16.000"]
    assert " ".join(listed["raw"][3:]).startswith("The bits of the logical dtype")


def test_no_extra_is_needed():
    done = subprocess.run([sys.executable, "-c", WITHOUT_EXTRAS], capture_output=True, text=True, check=True)
    assert tuple(rows(done.stdout)) == qpaged.available_formats(packed=True)
    assert done.stderr == ""


def test_the_command_line_runs_as_a_module():
    done = subprocess.run(
        [sys.executable, "-m", "qpaged", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"qpaged {qpaged.__version__}\n"


def test_a_plugin_that_cannot_be_loaded_is_named(monkeypatch, capsys):
    claims = _registry._claims()
    broken = EntryPoint("broken", "no_such_module:Format", _registry.GROUP)
    monkeypatch.setattr(_registry, "_claims", lambda: {**claims, "broken": {"some-package": broken}})
    assert main(["formats"]) == 1
    captured = capsys.readouterr()
    assert "int8" in rows(captured.out)
    assert "the format 'broken' of package some-package cannot be loaded" in captured.err


def test_listed_bits_are_those_of_a_page():
    for info in installed_formats()[0]:
        quantizer = qpaged.get_quantizer(info.spelling)
        page = jax.eval_shape(quantizer.quantize, jax.ShapeDtypeStruct((1, 1, 16, 128), jnp.bfloat16))
        static = page.scales.size * 4 if quantizer.has_static_scales else 0  # which are no page's own
        size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree_util.tree_leaves(page)) - static
        assert info.bits_per_element == 8 * size / (16 * 128), info.spelling
