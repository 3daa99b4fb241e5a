"""Evaluation metrics of a run's saved artifact and of its base model."""

from sdtune.evaluation.subject_metrics import ClipMetrics

__all__ = ["ClipMetrics"]
