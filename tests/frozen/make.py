"""Freezes the bytes of formats that have no file here yet: ``python tests/frozen/make.py``.

A file that exists is never written again: pages that were saved must be read for as long as there is their
format, and a format whose bytes change needs another name.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from support.formats import BUILT_IN
from support.frozen_pages import make

if __name__ == "__main__":
    make(BUILT_IN)
