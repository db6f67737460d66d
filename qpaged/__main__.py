"""Runs the command line as ``python -m qpaged``."""

import sys

from qpaged.cli import main

if __name__ == "__main__":
    sys.exit(main())
