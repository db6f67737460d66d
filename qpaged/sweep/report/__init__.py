"""Reports a sweep's results: a table, figures, an HTML page, a verdict in words, and progress."""

from qpaged.sweep.report._figures import write_figures
from qpaged.sweep.report._progress import progress_bar
from qpaged.sweep.report._table import cell_text, print_table
from qpaged.sweep.report._verdict import verdict
from qpaged.sweep.report.page import write_report

__all__ = ["cell_text", "print_table", "progress_bar", "verdict", "write_figures", "write_report"]
