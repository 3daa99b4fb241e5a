"""The diffusion objective: noise schedule, prediction type, loss weighting, loss."""

from sdtune.objective.loss import Objective
from sdtune.objective.prediction import PredictionType, target
from sdtune.objective.schedule import NoiseSchedule
from sdtune.objective.weighting import MinSNR, Uniform, Weighting

__all__ = ["MinSNR", "NoiseSchedule", "Objective", "PredictionType", "Uniform", "Weighting", "target"]
