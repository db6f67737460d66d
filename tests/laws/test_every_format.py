"""Every law, for every registered format at every granularity in every set of wrappers."""

from formats import EVERY_FORMAT

from qpaged.testing import QuantizerConformance


class TestEveryFormat(QuantizerConformance):
    format = EVERY_FORMAT
