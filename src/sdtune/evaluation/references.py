"""The training images that an evaluation compares generated images with."""

from __future__ import annotations

import logging

import numpy as np

from sdtune.data import ImageDataModule
from sdtune.images.files import CENTER

log = logging.getLogger("sdtune")

REFERENCES = 64
"""Maximum number of training images that generated images are compared with."""


def references(data: ImageDataModule) -> list[np.ndarray]:
    """Training images, center-cropped to their buckets: at most :data:`REFERENCES`, evenly spaced."""
    if len(data.train) > REFERENCES:
        log.info("evaluation: generated images are compared with %d of %d training images", REFERENCES, len(data.train))
    step = max(1, len(data.train) // REFERENCES)
    samples = (data.train[index] for index in range(0, len(data.train), step)[:REFERENCES])
    return [sample.pixels(data.bucket(sample), CENTER, False) for sample in samples]
