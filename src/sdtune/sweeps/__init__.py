"""Sweeps: launch, stop, resume and prune many runs from one command."""
