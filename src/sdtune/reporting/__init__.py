"""A folder of runs as one page: ranked, compared, with costs and samples."""

from sdtune.reporting.collect import Run, collect
from sdtune.reporting.page import write_report

__all__ = ["Run", "collect", "write_report"]
