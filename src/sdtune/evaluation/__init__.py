"""What training changed, measured on what others would load."""

from sdtune.evaluation.general import ClipFigures

__all__ = ["ClipFigures"]
