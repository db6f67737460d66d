"""qpaged's laws for the installed nf4."""

from qpaged.testing import QuantizerConformance


class TestNf4(QuantizerConformance):
    format = ("nf4", "nf4:token+rotate")
