"""What a training will cost, counted on the meta device before anything is loaded."""

from sdtune.planning.measure import TrainingCosts, measure
from sdtune.planning.memory import SWITCHES, Memory, Switches, memory

__all__ = ["SWITCHES", "Memory", "Switches", "TrainingCosts", "measure", "memory"]
