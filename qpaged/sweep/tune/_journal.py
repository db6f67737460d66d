"""A file that keeps the measurements of a search, so that an interrupted search can be resumed."""

import json
from pathlib import Path
from typing import Any

from qpaged._files import DIGEST, digest, has_own_digest, write_whole


class Journal:
    """Measurements by key, written to a file one by one.

    Args:
        path: the file; measurements that it holds of other conditions are dropped.
        conditions: JSON values that the measurements depend on.
        fresh: drop the file's measurements in any case.
    """

    def __init__(self, path: Path, conditions: Any, fresh: bool = False):
        self.path = path
        self._record = {"conditions": json.loads(json.dumps(conditions)), "values": {}}
        if fresh:
            return
        try:
            earlier = json.loads(path.read_text(encoding="utf-8"))
            same_conditions = has_own_digest(earlier) and earlier["conditions"] == self._record["conditions"]
            if same_conditions and isinstance(earlier["values"], dict):
                self._record = earlier
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            pass  # The file is missing or no journal; a search may always start anew.

    def get(self, key: str) -> Any:
        """Return the JSON value that was kept under ``key``; None if there is none."""
        return self._record["values"].get(key)

    def keep(self, key: str, value: Any) -> None:
        """Keep a JSON value, and write the file; an interrupt leaves the previous file."""
        self._record["values"][key] = value
        self._record[DIGEST] = digest(self._record)
        write_whole(self.path, json.dumps(self._record))
