"""A folder of runs as one page: which is best, by how much, at what cost, and how each looks."""

from sdtune.reporting.collect import Run, collect
from sdtune.reporting.page import write_report

__all__ = ["Run", "collect", "write_report"]
