"""The laws of qpaged's cache, for nf4 as it is installed."""

from qpaged.testing import QuantizerConformance


class TestNf4(QuantizerConformance):
    format = ("nf4", "nf4:token+rotate")
