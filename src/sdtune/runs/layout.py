"""Names of files in a run folder."""

from __future__ import annotations

CARD, CARD_GRID = "README.md", "samples.png"
"""Model card and its image, in an artifact folder."""

BEST = "best.ckpt"
"""Checkpoint with the lowest validation loss."""

THREADS = "threads.json"
"""In a run folder: the number of CPU threads of torch."""

READINGS = "readings.json"
"""In an evaluation folder: the classifier readings of each image."""

TRAINING_IMAGES = "training_images"
"""In a run folder: small copies of the first training images, and ``images.json`` with their captions."""
