"""Every law for every registered format, at every granularity and in every set of wrappers."""

from support.formats import LAWFUL

from qpaged.testing import QuantizerConformance


class TestEveryFormat(QuantizerConformance):
    format = LAWFUL
