"""report.html: what a sweep found, on one page that needs no network."""

from qpaged.sweep._report._page import write_report

__all__ = ["write_report"]
