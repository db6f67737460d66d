"""A griffe extension that shows Sphinx roles (``:class:`Name` ``) as code, and a final ``::`` as a colon."""

import re
from typing import Any

import griffe

ROLE = re.compile(r":\w+:`([\w.]+)`")
EXAMPLE = re.compile(r"::$", re.MULTILINE)


class Roles(griffe.Extension):
    """Rewrites each docstring as Markdown."""

    def on_object(self, *, obj: griffe.Object, loader: Any, **kwargs: Any) -> None:
        if obj.docstring:
            obj.docstring.value = EXAMPLE.sub(":", ROLE.sub(r"`\1`", obj.docstring.value))
