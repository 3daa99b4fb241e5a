"""Names of the files and folders that a run leaves."""

from __future__ import annotations

CARD, CARD_GRID = "README.md", "samples.png"
"""The model card and its image, in an artifact's folder."""

BEST = "best.ckpt"
"""The checkpoint of the lowest validation loss."""

THREADS = "threads.json"
"""Of a run's folder: with how many threads torch computed on the CPU."""

READINGS = "readings.json"
"""In an evaluation's folder: what was read off each image."""
