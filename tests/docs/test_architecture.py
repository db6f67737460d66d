"""The page about the house names files and functions that exist."""

import re

import pytest
from support.doc_scripts import ROOT

PAGE = (ROOT / "docs/architecture.md").read_text()
PATHS = sorted(set(re.findall(r"`((?:qpaged|quantizers|tests|docs)/[\w/]+\.(?:py|md))`", PAGE)))
STEPS = re.findall(r"^\| \[?`(\w+)`\S* \| `([\w/]+\.py)` \|", PAGE, re.MULTILINE)


@pytest.mark.parametrize("path", PATHS)
def test_files_that_the_page_names_exist(path):
    assert (ROOT / path).is_file()


@pytest.mark.parametrize(("function", "path"), STEPS)
def test_functions_that_the_page_names_are_defined_in_their_files(function, path):
    assert re.search(rf"^ *def {function}\(", (ROOT / path).read_text(), re.MULTILINE)


def test_the_page_follows_a_key_and_a_query():
    assert len(STEPS) == 24
