"""Measuring what training changed, on the artifact that other programs load."""

from sdtune.evaluation.subject_metrics import ClipMetrics

__all__ = ["ClipMetrics"]
