"""Law 8: scales go where their codes go, and a format keeps its identity in files."""

import json
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

import qpaged
from qpaged.quantizer import quantizer_from_config
from qpaged.testing._law import law
from qpaged.testing._pool import PAGES, TABLE, different, parts, pools
from qpaged.testing._subject import Subject

FREE = np.array([0, 3, 2], np.int32)  # pages that the sequence does not lie on


def copies(subject: Subject, rows: np.ndarray) -> None:
    """Law 8: every part of a page is that page's own, and a copied page has the bits of its original."""
    keeps, view = law(8, subject), subject.prefilled(rows)
    for name, pages in pools(view):
        for part, stored in parts(pages).items():
            own = stored.ndim == len(pages.shape) and stored.shape[1] == PAGES
            keeps(
                own,
                f"{part} {stored.shape} of {name} are not page by page, so that no page can be moved alone",
            )
    after, _ = subject.copied(view, TABLE, FREE)
    for (name, old), (_, new) in zip(pools(view), pools(after), strict=True):
        kept = isinstance(new, qpaged.QuantizedArray) and new.quantizer == subject.quantizer
        keeps(kept, f"copying pages makes the {name} something else")
        for part, stored in parts(new).items():
            wanted = parts(old)[part].copy()
            wanted[:, FREE] = wanted[:, TABLE]
            same = stored.tobytes() == wanted.tobytes()
            keeps(same, f"a copied page has other {part} than the page of {name} that it was copied from")


def identity(subject: Subject) -> None:
    """Law 8: the configuration is plain JSON and makes this very format again; so does the spelling."""
    keeps, quantizer = law(8, subject), subject.quantizer
    config = quantizer.config
    read = attempt(lambda: json.loads(json.dumps(config)))
    keeps(read == config, f"its config {config} comes back from JSON as {read!r}")
    again = attempt(lambda: rebuilt(quantizer, read))
    same = again == quantizer and hash(again) == hash(quantizer)
    keeps(same, f"its config {read} makes {again!r}, which is not {quantizer!r}")
    if registered(quantizer):
        spelled = attempt(lambda: qpaged.get_quantizer(str(quantizer)))
        keeps(spelled == quantizer, f"its spelling {quantizer} makes {spelled!r}, which is not {quantizer!r}")


def attempt(made: Callable[[], Any]) -> Any:
    """What is made, or the error that comes instead."""
    try:
        return made()
    except (TypeError, ValueError) as failure:
        return failure


def records(subject: Subject, rows: np.ndarray) -> None:
    """Law 8: a view read from JSON is the one that was written, and one of another format is refused."""
    keeps, view = law(8, subject), subject.prefilled(rows)
    text = view.to_json()
    again = type(view).from_json(text)
    kinds: list[Any] = [jax.tree_util.tree_structure(tree) for tree in (view, again)]
    keeps(kinds[0] == kinds[1], "a view comes back from JSON as another kind of thing")
    found = different(view, again)
    keeps(not found, f"a view comes back from JSON with other bits in {', '.join(found)}")
    for what, spoilt in spoiled(json.loads(text)).items():
        refused = isinstance(attempt(lambda: type(view).from_dict(spoilt)), ValueError)  # noqa: B023
        keeps(refused, f"a record {what} was read as if it were whole")


def spoiled(record: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Records that must be refused, by what is wrong with them."""
    pages = record["key_pages"]
    config, codes = pages["quantizer"], pages["codes"]

    def with_pages(**changes: Any) -> dict[str, Any]:
        return record | {"key_pages": pages | changes}

    return {
        "of an unknown format": with_pages(quantizer=config | {"name": "no-such-format"}),
        "of a format with an unknown option": with_pages(quantizer=config | {"no-such-option": 1}),
        "without scales or with some too many": with_pages(scales=None if pages["scales"] else codes),
        "whose codes are cut off": with_pages(codes=codes | {"data": codes["data"][:8]}),
        "of another version": record | {"version": 0},
    }


def registered(quantizer: qpaged.Quantizer) -> bool:
    """Whether the names that a format is made of are installed."""
    inner = getattr(quantizer, "inner", None)
    if inner is None:
        return quantizer.name in qpaged.available_quantizers()
    return f"+{quantizer.name}" in qpaged.available_wrappers() and registered(inner)


def rebuilt(quantizer: qpaged.Quantizer, config: dict[str, Any]) -> qpaged.Quantizer:
    """The format that a configuration describes: by name if that is installed, by the same classes if not."""
    if registered(quantizer):
        return quantizer_from_config(config)
    options = {name: value for name, value in config.items() if name != "name"}
    inner = getattr(quantizer, "inner", None)
    if inner is not None:
        options["inner"] = rebuilt(inner, options["inner"])
    return type(quantizer)(**options)
