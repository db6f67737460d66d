"""Reads the Sphinx roles of docstrings (``:class:`Name` ``) as links, where the name is of this package."""

import re
from typing import Any

import griffe

ROLE = re.compile(r":\w+:`([\w.]+)`")


class Roles(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, loader: Any, **kwargs: Any) -> None:
        if obj.docstring:
            obj.docstring.value = ROLE.sub(r"`\1`", obj.docstring.value)
