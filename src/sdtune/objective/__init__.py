"""The training objective: probability path, timesteps, prediction type, loss weighting, loss."""

from sdtune.objective.loss import Objective
from sdtune.objective.path import DDPMPath, FlowPath, ProbabilityPath
from sdtune.objective.prediction import PredictionType
from sdtune.objective.schedule import NoiseSchedule
from sdtune.objective.timesteps import Timesteps
from sdtune.objective.weighting import MinSNR, Uniform, Weighting

__all__ = [
    "DDPMPath",
    "FlowPath",
    "MinSNR",
    "NoiseSchedule",
    "Objective",
    "PredictionType",
    "ProbabilityPath",
    "Timesteps",
    "Uniform",
    "Weighting",
]
