"""The old name of :mod:`qpaged.formats`, kept for one version."""

from qpaged._deprecated import warn_renamed
from qpaged.formats import *  # noqa: F403

warn_renamed("qpaged.quantizer", "qpaged.formats")
