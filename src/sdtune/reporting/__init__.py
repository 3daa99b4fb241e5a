"""HTML report of a folder of runs: ranking, comparison, costs, samples."""

from sdtune.reporting.collect import Run, collect
from sdtune.reporting.page import write_report

__all__ = ["Run", "collect", "write_report"]
