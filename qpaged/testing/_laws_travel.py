"""Law 8: scales go where their codes go, and a format keeps its identity in files."""

import json
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np

import qpaged
from qpaged.formats import quantizer_from_config
from qpaged.pools import format_of
from qpaged.testing._law import law
from qpaged.testing._pools import (
    PAGES,
    TABLE,
    View,
    differences,
    has_static,
    parts,
    pools,
    same_structure,
)
from qpaged.testing._subject import Subject

FREE = np.array([0, 3, 2], np.int32)  # pages that the sequence does not use

Record = dict[str, Any]
"""JSON, as ``to_json`` and ``config`` write it."""
T = TypeVar("T")


def copies(subject: Subject, rows: np.ndarray) -> None:
    """Law 8: every part of a page is that page's own, and a copied page has the bits of its original.

    Static scales are no page's own: they are those of the pool, and a copy leaves them alone.
    """
    check = law(8, subject)
    view = subject.prefilled(rows)
    for name, pages in pools(view):
        for part, stored in parts(pages).items():
            by_page = stored.ndim == len(pages.shape) and stored.shape[1] == PAGES
            check(
                by_page or has_static(pages, part),
                f"{part} {stored.shape} of {name} are not page by page, so that no page can be moved alone",
            )
    after, _ = subject.copied(view, TABLE, FREE)
    for (name, old), (_, new) in zip(pools(view), pools(after), strict=True):
        check(format_of(new) == subject.quantizer, f"copying pages makes the {name} something else")
        old_parts = parts(old)
        for part, stored in parts(new).items():
            expected = old_parts[part].copy()
            if not has_static(new, part):
                expected[:, FREE] = expected[:, TABLE]
            same = stored.tobytes() == expected.tobytes()
            check(same, f"a copied page has other {part} than the page of {name} that it was copied from")


# (source, target) of each pair: a swap, a page that another one reads, two pairs out of range; and then
# several pairs with one target, of which the last that is in range counts.
COPIES = (
    ((4, 1, 5, PAGES, 0), (1, 4, 0, 2, -1)),
    ((4, 1, 5, -1, 1), (2, 2, 2, 2, 3)),
)


def copied_pages(subject: Subject, rows: np.ndarray) -> None:
    """Laws 3, 4 and 8: ``copy_pages`` gives targets the bits of their sources, and touches nothing else."""
    view = subject.prefilled(rows)
    for source, target in COPIES:
        after = subject.copy_pages(view, np.array(source, np.int32), np.array(target, np.int32))
        last_source = {}
        for page, copy in zip(source, target, strict=True):
            if 0 <= page < PAGES and 0 <= copy < PAGES:
                last_source[copy] = page
        untouched = [page for page in range(PAGES) if page not in last_source]
        pairs = f"copying pages {list(source)} to {list(target)}"
        for (name, old), (_, new) in zip(pools(view), pools(after), strict=True):
            old_parts = parts(old)
            for part, stored in parts(new).items():
                if has_static(new, part):
                    same = stored.tobytes() == old_parts[part].tobytes()
                    law(8, subject)(same, f"{pairs} changes the static {part} of {name}")
                    continue
                for copy, page in last_source.items():
                    same = stored[:, copy].tobytes() == old_parts[part][:, page].tobytes()
                    law(8, subject)(
                        same, f"{pairs} leaves {copy} with other {part} of {name} than {page} had"
                    )
                kept = stored[:, untouched].tobytes() == old_parts[part][:, untouched].tobytes()
                law(3, subject)(kept, f"{pairs} changes {part} of {name} in pages that are no targets")
    nowhere = np.array([-1, PAGES, 0, -PAGES, PAGES + 1], np.int32)
    changed = differences(subject.copy_pages(view, nowhere, nowhere[::-1]), view)
    law(4, subject)(not changed, f"copying pages out of range changes {', '.join(changed)}")


def identity(subject: Subject) -> None:
    """Law 8: the configuration is plain JSON and makes this very format again; so does the spelling."""
    check = law(8, subject)
    quantizer = subject.quantizer
    config = quantizer.config
    from_json: Any = result_or_error(lambda: json.loads(json.dumps(config)))
    check(from_json == config, f"its config {config} comes back from JSON as {from_json!r}")
    rebuilt = result_or_error(lambda: quantizer_like(quantizer, from_json))
    same = rebuilt == quantizer and hash(rebuilt) == hash(quantizer)
    check(same, f"its config {from_json} makes {rebuilt!r}, which is not {quantizer!r}")
    if registered(quantizer):
        spelled = result_or_error(lambda: qpaged.get_quantizer(str(quantizer)))
        check(spelled == quantizer, f"its spelling {quantizer} makes {spelled!r}, which is not {quantizer!r}")


def result_or_error(function: Callable[[], T]) -> T | TypeError | ValueError:
    """Return what the function returns, or the error that it raises."""
    try:
        return function()
    except (TypeError, ValueError) as error:
        return error


def records(subject: Subject, rows: np.ndarray) -> None:
    """Law 8: a view read from JSON is the one that was written, and one of another format is refused."""
    check = law(8, subject)
    view = subject.prefilled(rows)
    text = view.to_json()
    loaded = View.from_json(text)
    check(same_structure(loaded, view), "a view comes back from JSON as another kind of thing")
    changed = differences(view, loaded)
    check(not changed, f"a view comes back from JSON with other bits in {', '.join(changed)}")
    for defect, record in defective_records(json.loads(text)).items():
        check(is_refused(record), f"a record {defect} was read as if it were whole")


def is_refused(record: Record) -> bool:
    """Return True if no view can be read from the record."""
    return isinstance(result_or_error(lambda: View.from_dict(record)), ValueError)


def defective_records(record: Record) -> dict[str, Record]:
    """Return records that must be refused, by what is wrong with them."""
    pages = record["key_pages"]
    config = pages["quantizer"]
    codes = pages["codes"]
    wrong_scales = None if pages["scales"] else codes

    def with_pages(**changes: Any) -> Record:
        return record | {"key_pages": pages | changes}

    return {
        "of an unknown format": with_pages(quantizer=config | {"name": "no-such-format"}),
        "of a format with an unknown option": with_pages(quantizer=config | {"no-such-option": 1}),
        "without scales or with some too many": with_pages(scales=wrong_scales),
        "whose codes are cut off": with_pages(codes=codes | {"data": codes["data"][:8]}),
        "of another version": record | {"version": 0},
    }


def registered(quantizer: qpaged.Quantizer) -> bool:
    """Return True if the format and all its wrappers have entry points."""
    inner = getattr(quantizer, "inner", None)
    if inner is None:
        return quantizer.name in qpaged.available_quantizers()
    return f"+{quantizer.name}" in qpaged.available_wrappers() and registered(inner)


def quantizer_like(quantizer: qpaged.Quantizer, config: Record) -> qpaged.Quantizer:
    """Build a format from its configuration: by name if it is registered, by the same classes if not."""
    if registered(quantizer):
        return quantizer_from_config(config)
    options = {name: value for name, value in config.items() if name != "name"}
    inner = getattr(quantizer, "inner", None)
    if inner is not None:
        options["inner"] = quantizer_like(inner, options["inner"])
    return type(quantizer)(**options)
