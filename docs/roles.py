"""Docstrings as Markdown: Sphinx roles (``:class:`Name` ``) as code, ``::`` at a line end as a colon."""

import re
from typing import Any

import griffe

ROLE = re.compile(r":\w+:`([\w.]+)`")
EXAMPLE = re.compile(r"::$", re.MULTILINE)


class Roles(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, loader: Any, **kwargs: Any) -> None:
        if obj.docstring:
            obj.docstring.value = EXAMPLE.sub(":", ROLE.sub(r"`\1`", obj.docstring.value))
