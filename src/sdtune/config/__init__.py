"""Compose configs with Hydra, check them against constructor signatures, and build the objects."""
