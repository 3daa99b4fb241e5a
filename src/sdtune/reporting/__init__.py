"""HTML report of a folder of runs: ranking, comparison, costs, samples."""

from sdtune.reporting.collect import Run, collect
from sdtune.reporting.page import write_report
from sdtune.reporting.ranking import ranking_lines

__all__ = ["Run", "collect", "ranking_lines", "write_report"]
