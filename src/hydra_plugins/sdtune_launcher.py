"""Hydra takes plugins from this namespace alone, and by the module that a class is defined in."""

from sdtune.sweeps import shared_launcher


class SharedBackboneLauncher(shared_launcher.SharedBackboneLauncher):
    """See :class:`sdtune.sweeps.shared_launcher.SharedBackboneLauncher`."""
