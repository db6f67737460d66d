"""Writes ``report.html``: a sweep's results on one page that needs no network."""

from qpaged.sweep.report.page._page import write_report

__all__ = ["write_report"]
