"""What training changed, measured on what others would load."""

from sdtune.evaluation.subject_metrics import ClipMetrics

__all__ = ["ClipMetrics"]
