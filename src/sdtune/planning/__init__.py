"""What a training will cost, counted on the meta device before anything is loaded."""

from sdtune.planning.measure import Figures, measure
from sdtune.planning.memory import SWITCHES, Memory, Switches, memory

__all__ = ["SWITCHES", "Figures", "Memory", "Switches", "measure", "memory"]
