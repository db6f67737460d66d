"""The choice between qax and our own implementation, and the errors if neither works."""

import importlib.metadata
import subprocess
import sys

import jax
import pytest
from support.implicit_arrays import needs_own_implementation

import qpaged.implicit as qi
from qpaged.implicit import _provider

PROTOCOL = (
    "ArrayValue",
    "ImplicitArray",
    "UninitializedAval",
    "aux_field",
    "default_handler",
    "freeze_keys",
    "materialize_nested",
    "primitive_handler",
    "use_implicit_args",
)
with_qax = pytest.mark.skipif(qi.provider().name != "qax", reason="needs qax and the JAX that it works on")


@with_qax
@pytest.mark.parametrize("name", PROTOCOL)
def test_names_are_the_objects_of_qax(name):
    import qax

    assert getattr(qi, name) is getattr(qax, name)
    assert str(qi.provider()) == "qax 0.4.1"


def test_every_public_name_exists():
    for name in (*PROTOCOL, *qi.__all__):
        assert getattr(qi, name) is not None


def test_importing_does_not_warn():
    code = "import qpaged.implicit"
    assert subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True).returncode == 0


@needs_own_implementation
def test_the_provider_is_qpaged_without_qax(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    assert str(qi.provider()) == "qpaged: qax is not installed"


@needs_own_implementation
def test_the_provider_says_why_a_broken_qax_is_not_used(monkeypatch, tmp_path):
    (tmp_path / "qax.py").write_text("raise AttributeError('jax.core.new_main is gone')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.4.1")
    assert str(qi.provider()) == (
        f"qpaged: qax 0.4.1 on JAX {jax.__version__}: "
        "importing it fails with AttributeError: jax.core.new_main is gone"
    )


@needs_own_implementation
def test_the_provider_says_why_a_working_qax_is_not_used(monkeypatch, tmp_path):
    (tmp_path / "qax.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.5")
    assert str(qi.provider()).endswith("it is used with JAX 0.4.35 only")
    sys.modules.pop("qax")


@pytest.mark.parametrize("version", ["0.10.2", "0.12.0.1", "0.13.0.dev20270101+cpu", "1.0"])
def test_a_new_jax_needs_no_qax(version):
    assert _provider.choose(version) is None


@pytest.mark.parametrize("version", ["0.4.34", "0.4.36", "0.9.2", "0.10.1"])
def test_versions_of_jax_between_the_two_are_refused(version):
    with pytest.raises(ImportError) as error:
        _provider.choose(version)
    text = str(error.value)
    assert f"JAX {version}" in text
    assert 'pip install -U "jax>=0.10.2"' in text
    assert 'pip install "qpaged[qax]"' in text
    assert "tested with JAX 0.10.2 and later, and with JAX 0.4.35 through qax 0.4.1" in text


@needs_own_implementation
def test_the_jax_of_qax_with_a_broken_qax_is_refused(monkeypatch, tmp_path):
    (tmp_path / "qax.py").write_text("raise ImportError('plum has moved')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ImportError, match="importing it fails with ImportError: plum has moved"):
        _provider.choose("0.4.35")
