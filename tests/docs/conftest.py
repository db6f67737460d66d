"""The example plugin, as if it were installed."""

import tomllib

import pytest
from support.doc_scripts import PLUGIN


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """The metadata that an installation of the plugin would leave, and its modules; gone after the test."""
    project = tomllib.loads((PLUGIN / "pyproject.toml").read_text())["project"]
    installed = tmp_path / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    )
    groups = project["entry-points"].items()
    lines = [f"[{group}]\n" + "\n".join(f"{k} = {v}" for k, v in points.items()) for group, points in groups]
    (installed / "entry_points.txt").write_text("\n\n".join(lines) + "\n")
    monkeypatch.syspath_prepend(str(PLUGIN))
    monkeypatch.syspath_prepend(str(tmp_path))
