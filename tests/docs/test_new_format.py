"""``docs/new_format.py``, and that it has been run for every built-in format."""

import pytest
from support import frozen_pages
from support.doc_scripts import ROOT, script
from support.formats import BUILT_IN

new_format = script(ROOT / "docs/new_format.py")
PAGE = (ROOT / "docs/formats.md").read_text()
NAMES = sorted({spelling.partition("+")[0].partition(":")[0] for spelling in BUILT_IN})


def test_the_spellings_of_names_are_all_built_in_spellings():
    spellings = [spelling for name in NAMES for spelling in new_format.spellings_of(name)]
    assert sorted(spellings) == sorted(BUILT_IN)
    assert "int8:token" in new_format.spellings_of("int8")
    assert "int8:channel+offset+rotate" in new_format.spellings_of("+rotate")
    assert not {"int8", "int8+offset"} & set(new_format.spellings_of("+rotate"))


@pytest.mark.parametrize("name", NAMES)
def test_the_page_of_formats_has_a_section_for_every_class(name):
    assert new_format.add_sections(name, PAGE) == PAGE, f"run python docs/new_format.py {name}"


def test_a_format_without_a_section_gets_one_before_the_wrappers():
    page = PAGE.replace("::: quantizers.Nvfp4\n", "")
    added = new_format.add_sections("nvfp4", page)
    before, _, after = added.partition("## nvfp4\n\n::: quantizers.Nvfp4\n")
    assert before in page and after.partition("\n\n")[2].startswith("## Wrappers\n")


def test_a_name_without_an_entry_point_is_refused(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["new_format", "int7"])
    with pytest.raises(SystemExit):
        new_format.main()
    assert "qpaged has no entry point 'int7'; add it to pyproject.toml" in capsys.readouterr().err


def test_a_run_for_a_finished_format_changes_nothing(monkeypatch):
    monkeypatch.setattr("sys.argv", ["new_format", "int8"])
    files = [ROOT / "docs/formats.md", ROOT / "docs/includes/sizes.md", *frozen_pages.FOLDER.glob("*.json")]
    before = {path: path.read_bytes() for path in files}
    new_format.main()
    assert {path: path.read_bytes() for path in before} == before
    assert len(list(frozen_pages.FOLDER.glob("*.json"))) == len(files) - 2
