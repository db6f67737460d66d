"""Writes what a new built-in format needs beside its file and its entry point.

    python docs/new_format.py NAME...

``NAME`` is the name of an entry point: ``int8``, or ``+rotate`` for a wrapper. For each one the script writes

- the frozen pages of its spellings in ``tests/frozen``; a file that exists is never written again, since
  saved pages must stay readable, and a format whose bytes change needs another name;
- its rows of the table of sizes, ``docs/includes/sizes.md``;
- its section of ``docs/formats.md``, unless the page has one.
"""

import argparse
import sys
from pathlib import Path

import jax

import qpaged

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "tests"))

from support.doc_scripts import script  # noqa: E402 - found on the path above
from support.formats import BUILT_IN  # noqa: E402
from support.frozen_pages import freeze  # noqa: E402

sizes = script(ROOT / "docs/includes/sizes.py")
PAGE = ROOT / "docs/formats.md"
SECTION = """## {heading}

::: {path}
    options: {{members: false, heading_level: 3, show_signature: false}}

"""


def spellings_of(name: str) -> list[str]:
    """Return the built-in spellings in which a format or a wrapper occurs."""
    if name.startswith("+"):
        return [spelling for spelling in BUILT_IN if name in spelling.replace("+", " +").split()]
    return [spelling for spelling in BUILT_IN if spelling.partition("+")[0].partition(":")[0] == name]


def add_sections(name: str, page: str) -> str:
    """Return the page with a section for each class of a format that it does not show yet."""
    spellings = [spelling for spelling in spellings_of(name) if "+" not in spelling]
    spellings_by_class: dict[str, list[str]] = {}
    for spelling in spellings:
        path = documented_path(type(qpaged.get_quantizer(spelling)))
        spellings_by_class.setdefault(path, []).append(spelling)
    for path, of_class in spellings_by_class.items():
        if f"::: {path}\n" not in page:
            section = SECTION.format(heading=", ".join(of_class), path=path)
            page = page.replace("## Wrappers\n", f"{section}## Wrappers\n")
    return page


def documented_path(cls: type) -> str:
    """Return the shortest dotted path at which the class can be imported."""
    package = cls.__module__.partition(".")[0]
    if getattr(sys.modules[package], cls.__name__, None) is cls:
        return f"{package}.{cls.__name__}"
    return f"{cls.__module__}.{cls.__name__}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="+", metavar="NAME", help="the name of an entry point")
    names = parser.parse_args().names
    jax.config.update("jax_platforms", "cpu")
    for name in names:
        spellings = spellings_of(name)
        if not spellings:
            parser.error(
                f"qpaged has no entry point {name!r}; add it to pyproject.toml under qpaged.quantizers and "
                f"install again: pip install -e ."
            )
        freeze(spellings)
        if not name.startswith("+"):
            PAGE.write_text(add_sections(name, PAGE.read_text()))
    sizes.TABLE.write_text(sizes.table(["plain", *sizes.built_in()]))


if __name__ == "__main__":
    main()
