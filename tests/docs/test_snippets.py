"""The documentation's Python runs, and its generated files are as their scripts would write them now."""

import os
import re

import jax
import pytest
from support.doc_scripts import ROOT, script

from qpaged.cli import main

LLAMA = ROOT / "docs/includes/llama-3.1-8b.json"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
FRAMEWORKS = {"flax", "transformers"}  # which parts of docs/adopt.md need
LONG = {"docs/adopt.md", "docs/int8.md"}  # the first needs models, and is run whole with EVERY_MODEL
INCLUDE = re.compile(r'^--8<-- "(.*)"$', re.MULTILINE)


def snippets(page):
    """Return (line, source) of each fenced Python block of a page, with its includes inserted."""
    text = page.read_text()
    return [(text.count("\n", 0, match.start(1)), included(match.group(1))) for match in FENCE.finditer(text)]


def included(source):
    """Return a snippet with the files that it includes."""
    return INCLUDE.sub(lambda match: (ROOT / match.group(1)).read_text(), source)


def page_parameter(page):
    name = str(page.relative_to(ROOT))
    long = name in LONG and not os.environ.get("EVERY_MODEL")
    return pytest.param(page, id=name, marks=[pytest.mark.long] * long)


@pytest.mark.parametrize("page", [page_parameter(page) for page in PAGES if snippets(page)])
def test_snippets_run(page, plugin):
    namespace = {"__name__": "snippets"}
    missing = set()
    for line, source in snippets(page):
        try:
            # Blank lines make tracebacks name the lines of the page.
            with jax.numpy_dtype_promotion("standard"):
                exec(compile("\n" * line + source, page, "exec"), namespace)
        except ModuleNotFoundError as error:
            if error.name not in FRAMEWORKS or os.environ.get("EVERY_MODEL"):
                raise
            missing.add(error.name)
    if missing:
        pytest.skip(f"parts need {', '.join(sorted(missing))}, which is not installed; the others ran")


def test_the_pages_have_snippets():
    counts = {str(page.relative_to(ROOT)): len(snippets(page)) for page in PAGES}
    assert counts["README.md"] == 1
    assert counts["docs/errors.md"] == 4
    assert any("class Nf4" in source for _, source in snippets(ROOT / "docs/writing-a-format.md"))


FIGURES = script(ROOT / "docs/figures/draw.py").FIGURES


@pytest.mark.parametrize("name", FIGURES)
def test_figures_are_as_the_script_draws_them(name):
    drawn = FIGURES[name]()
    assert (ROOT / "docs/figures" / name).read_text() == drawn, "run python docs/figures/draw.py"


def test_the_tables_of_sizes_are_as_allocated():
    sizes = script(ROOT / "docs/includes/sizes.py")
    table = sizes.table(["plain", *sizes.built_in()])
    assert sizes.TABLE.read_text() == table, "run python docs/includes/sizes.py"
    shown = ["plain", "int8", "int8:token", "fp8_e4m3", "int4", "nvfp4", "int2+offset", "raw"]
    assert sizes.table(shown) in (ROOT / "README.md").read_text(), (
        f"README.md must show:\n{sizes.table(shown)}"
    )


def test_the_table_of_laws_is_of_the_kit():
    laws = script(ROOT / "docs/includes/laws.py")
    assert laws.TABLE.read_text() == laws.table(), "run python docs/includes/laws.py"


def test_the_plan_that_is_shown_is_what_the_command_prints(capsys):
    command, _, printed = (ROOT / "docs/includes/plan.txt").read_text().partition("\n")
    arguments = command.removeprefix("$ qpaged ").split()
    assert main([argument.replace("config.json", str(LLAMA)) for argument in arguments]) == 0
    assert capsys.readouterr().out == printed


@pytest.mark.parametrize("name", script(ROOT / "docs/includes/results.py").TABLES)
def test_tables_are_of_the_committed_results(name):
    results = script(ROOT / "docs/includes/results.py")
    assert (ROOT / "docs/includes" / name).read_text() == results.TABLES[name](), (
        "run docs/includes/results.py"
    )
