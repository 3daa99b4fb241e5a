"""Hydra takes plugins from this namespace alone, and by the module that a class is defined in."""

from sdtune import optuna_sweeper


class OptunaSweeper(optuna_sweeper.OptunaSweeper):
    """See :class:`sdtune.optuna_sweeper.OptunaSweeper`."""
