"""Lightning callbacks: metrics, sample images, checkpoints, EMA, progress bar."""

from sdtune.callbacks.best_artifact import EarlyStopping
from sdtune.callbacks.checkpoints import Checkpoints
from sdtune.callbacks.ema import EMA
from sdtune.callbacks.pruning import Pruning
from sdtune.callbacks.samples import Samples

__all__ = ["EMA", "Checkpoints", "EarlyStopping", "Pruning", "Samples"]
