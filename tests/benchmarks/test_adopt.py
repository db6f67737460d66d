"""Groups whose models come from checkouts: they are found, skipped with the way to get them, or refused."""

import json
import subprocess
import sys

import adopt
import pytest
from adopted._checkouts import REPOSITORIES, read_checkout

GROUPS = list(REPOSITORIES)


def make_checkout(folder, group, commit=True):
    """Make a folder with the file by which a checkout of a group is known."""
    repository = REPOSITORIES[group]
    model = folder / repository.root / repository.model
    model.parent.mkdir(parents=True)
    model.touch()
    if commit:
        git = ["git", "-C", folder, "-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "a"]):
            subprocess.run([*git, *command], check=True)
    return str(folder)


def error_of(argv, capsys):
    """Return what the command says when it refuses its arguments."""
    with pytest.raises(SystemExit, match="2"):
        adopt.main(argv)
    return capsys.readouterr().err


@pytest.mark.parametrize("group", GROUPS)
def test_a_checkout_is_known_by_its_model_and_recorded_by_its_commit(group, tmp_path):
    folder = make_checkout(tmp_path / "a", group)
    checkout = read_checkout(folder)
    assert checkout.group == group
    assert (checkout.root / REPOSITORIES[group].model).is_file()
    assert len(checkout.commit) == 12 and int(checkout.commit, 16)
    (checkout.root / REPOSITORIES[group].model).write_text("changed")
    assert read_checkout(folder).commit == f"{checkout.commit}-dirty"


@pytest.mark.parametrize("group", GROUPS)
def test_a_group_without_its_checkout_is_skipped_by_name(group, tmp_path, capsys):
    assert adopt.main(["--models", group, "--out", str(tmp_path / "a.json")]) == 0
    name = REPOSITORIES[group].name
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(
        f"{name} skipped: git clone https://github.com/jax-ml/{name} ../{name} && pip install "
    )
    assert line.endswith(f", then pass --source ../{name}")
    results = json.loads((tmp_path / "a.json").read_text())
    assert results["results"] == [] and name not in results["versions"]


def test_models_are_imported_from_their_own_checkouts(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", sys.path[:])
    folders = [make_checkout(tmp_path / group, group) for group in GROUPS]
    options = adopt.parse([argument for folder in folders for argument in ("--source", folder)])
    for group, checkout in zip(GROUPS, options.source, strict=True):
        assert adopt.import_from_checkout(group, options)
        assert sys.path[0] == str(checkout.root)


def test_a_folder_that_is_no_checkout_is_refused(tmp_path, capsys):
    message = error_of(["--source", str(tmp_path)], capsys)
    assert f"argument --source: '{tmp_path}' is no checkout of a known repository. Pass one: " in message
    assert "jax-llm-examples has llama3/llama3_jax/model.py (git clone " in message
    assert "; bonsai has bonsai/models/qwen3/modeling.py (git clone " in message


def test_a_checkout_without_a_commit_is_refused(tmp_path, capsys):
    folder = make_checkout(tmp_path / "a", "bonsai", commit=False)
    message = error_of(["--source", folder], capsys)
    assert f"'{folder}' has the files of bonsai but no commit, which the results record (" in message
    assert "Get it by git clone https://github.com/jax-ml/bonsai ../bonsai" in message


def test_two_checkouts_of_one_repository_are_refused(tmp_path, capsys):
    folder = make_checkout(tmp_path / "a", "bonsai")
    message = error_of(["--source", folder, "--source", folder], capsys)
    assert "argument --source: 2 checkouts of bonsai came; pass one." in message


def test_a_checkout_of_a_group_that_is_not_measured_is_refused(tmp_path, capsys):
    folder = make_checkout(tmp_path / "a", "bonsai")
    message = error_of(["--models", "penzai", "--source", folder], capsys)
    rule = "a checkout of bonsai came, but bonsai is not among the groups of --models, penzai; add it there."
    assert f"argument --source: {rule}" in message
