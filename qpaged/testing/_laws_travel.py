"""Law 8: scales go where their codes go, and a format keeps its identity in files."""

import json
from typing import Any

import jax
import numpy as np

import qpaged
from qpaged.quantizer import quantizer_from_config
from qpaged.testing._law import require
from qpaged.testing._pool import PAGES, TABLE, parts, pools
from qpaged.testing._subject import Subject

FREE = np.array([0, 5, 2], np.int32)  # pages that the sequence does not lie on


def copies(subject: Subject, rows: np.ndarray) -> None:
    """Law 8: every part of a page is that page's own, and a copied page reads as the one it was copied from."""
    view = subject.prefilled(rows)
    for name, pages in pools(view):
        for part, stored in parts(pages).items():
            own = stored.ndim == len(pages.shape) and stored.shape[1] == PAGES
            what = f"{part} {stored.shape} of {name} are not page by page, along axis 1"
            require(own, 8, subject, f"{what}: no page can be moved by itself")
    after, _ = subject.copied(view, TABLE, FREE)
    for (name, old), (_, new) in zip(pools(view), pools(after), strict=True):
        kept = isinstance(new, qpaged.QuantizedArray) and new.quantizer == subject.quantizer
        require(kept, 8, subject, f"copying pages makes the {name} something else")
        for part, stored in parts(new).items():
            wanted = parts(old)[part].copy()
            wanted[:, FREE] = wanted[:, TABLE]
            same = stored.tobytes() == wanted.tobytes()
            require(same, 8, subject, f"a copied page has other {part} than the {name} it was copied from")


def identity(subject: Subject) -> None:
    """Law 8: the configuration is plain JSON and makes this very format again; equal formats are one."""
    quantizer = subject.quantizer
    try:
        read = json.loads(json.dumps(quantizer.config))
    except TypeError as failure:
        require(False, 8, subject, f"its config is not plain JSON ({failure})")
    require(read == quantizer.config, 8, subject, f"its config {quantizer.config} comes back from JSON as {read}")
    try:
        again = rebuilt(quantizer, read)
    except (TypeError, ValueError) as failure:
        require(False, 8, subject, f"nothing can be made from its config {read}: {failure}")
    same = again == quantizer and hash(again) == hash(quantizer) and again.config == quantizer.config
    require(same, 8, subject, f"its config {read} makes {again!r}, which is not equal to {quantizer!r}")
    if registered(quantizer):
        spelled = qpaged.get_quantizer(str(quantizer))
        require(spelled == quantizer, 8, subject, f"its spelling {quantizer} makes {spelled!r} instead of {quantizer!r}")


def records(subject: Subject, rows: np.ndarray) -> None:
    """Law 8: a view read from JSON is the one that was written, and one of another format is refused."""
    view = subject.prefilled(rows)
    text = view.to_json()
    again = type(view).from_json(text)
    kind = jax.tree_util.tree_structure
    require(kind(again) == kind(view), 8, subject, "a view comes back from JSON as another kind of thing")
    for (name, old), (_, new) in zip(pools(view), pools(again), strict=True):
        for part, stored in parts(new).items():
            wanted = parts(old)[part]
            same = (stored.dtype, stored.tobytes()) == (wanted.dtype, wanted.tobytes())
            require(same, 8, subject, f"the {part} of the {name} come back from JSON with other bits")
    for what, spoilt in spoiled(json.loads(text)).items():
        try:
            type(view).from_dict(spoilt)
        except ValueError:
            continue
        require(False, 8, subject, f"a record {what} was read as if it were whole")


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
