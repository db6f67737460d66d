"""A fixture that makes the example plugin look installed."""

import tomllib

import pytest
from support.doc_scripts import PLUGIN


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """Put the plugin's modules, and the metadata of an installation, on the path for one test."""
    project = tomllib.loads((PLUGIN / "pyproject.toml").read_text())["project"]
    installed = tmp_path / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    )
    lines = []
    for group, points in project["entry-points"].items():
        lines += [f"[{group}]", *(f"{name} = {value}" for name, value in points.items())]
    (installed / "entry_points.txt").write_text("\n".join(lines) + "\n")
    monkeypatch.syspath_prepend(str(PLUGIN))
    monkeypatch.syspath_prepend(str(tmp_path))
