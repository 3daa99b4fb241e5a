"""What a run has left, in the forms that other programs read."""

from sdtune.exporting.artifact import Artifact, find
from sdtune.exporting.card import write_card
from sdtune.exporting.export_formats import FORMATS, Dtype, Export, Format

__all__ = ["FORMATS", "Artifact", "Dtype", "Export", "Format", "find", "write_card"]
