"""Freezes the bytes of formats that have no file here yet: ``python tests/frozen/make.py``.

A file that exists is never written again: pages that were saved must be read for as long as there is their
format, and a format whose bytes change needs another name.
"""

from frozen_pages import built_in_formats, make

if __name__ == "__main__":
    make(built_in_formats())
