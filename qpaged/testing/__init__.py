"""The conformance kit: the laws of the cache as tests that a format's own test file subclasses."""

from qpaged.testing._conformance import QuantizerConformance
from qpaged.testing._law import LAWS
from qpaged.testing._subject import Subject

__all__ = ["LAWS", "QuantizerConformance", "Subject"]
