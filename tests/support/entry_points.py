"""Formats that only a test has, registered as an installed package would register them."""

from qpaged.formats import _registry as registry


class Point:
    """An entry point of a package; ``make`` is what it loads, or the error that loading raises."""

    def __init__(self, name, package, make, value="package:Format"):
        self.name, self.value, self._make = name, value, make
        self.dist = package and type("Distribution", (), {"name": package})

    def load(self):
        if isinstance(self._make, BaseException):
            raise self._make
        return self._make


def install(monkeypatch, *points):
    """Add entry points to those that are installed, for one test."""
    installed = registry.entry_points(group=registry.GROUP)
    only(monkeypatch, *installed, *points)


def only(monkeypatch, *points):
    """Replace the entry points that are installed, for one test."""
    monkeypatch.setattr(registry, "entry_points", lambda group: points)
    monkeypatch.setattr(registry, "_claims", lambda: registry._read_claims.__wrapped__(()))  # not remembered
