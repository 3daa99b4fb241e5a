"""Hydra takes plugins from this namespace alone, and by the module that a class is defined in."""

from sdtune import shared_launcher


class SharedBackboneLauncher(shared_launcher.SharedBackboneLauncher):
    """See :class:`sdtune.shared_launcher.SharedBackboneLauncher`."""
