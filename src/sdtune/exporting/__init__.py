"""Export of trained artifacts to the formats of other programs, and model cards."""

from sdtune.exporting.artifact import Artifact, find_artifact
from sdtune.exporting.card import write_card
from sdtune.exporting.export_formats import FORMATS, Dtype, Export, Format

__all__ = ["FORMATS", "Artifact", "Dtype", "Export", "Format", "find_artifact", "write_card"]
