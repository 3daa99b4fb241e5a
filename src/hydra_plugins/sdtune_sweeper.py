"""Hydra takes plugins from this namespace alone, and by the module that a class is defined in."""

from sdtune.sweeps import optuna_sweeper


class OptunaSweeper(optuna_sweeper.OptunaSweeper):
    """See :class:`sdtune.sweeps.optuna_sweeper.OptunaSweeper`."""
