"""Image generation for evaluations: with a run's artifact, and with the base model."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock

from sdtune.backbone import Pretrained
from sdtune.backbone.backbone import Backbone
from sdtune.data import ImageDataModule
from sdtune.files import replacing
from sdtune.hardware.precision import precision
from sdtune.images.files import CENTER
from sdtune.loaders import controlnet as controlnets
from sdtune.loaders import lora as adapters
from sdtune.paths import cache_folder
from sdtune.sampling.loop import Request, Sampling, generate

log = logging.getLogger("sdtune")

REFERENCES = 64
"""Maximum number of training images that generated images are compared with."""


@contextmanager
def trained(source: Pretrained, artifact: Path, name: str, device: torch.device) -> Iterator[Backbone]:
    """Context manager that yields the backbone with a run's artifact, loaded from its exported files."""
    folder = artifact / name
    is_pipeline = (folder / "model_index.json").is_file()
    pretrained = source.of_trained_pipeline(folder) if is_pipeline else source
    backbone = pretrained.load().to(device)
    backbone.prepare_for_device(device)
    nets = controlnets.load_controlnets(backbone, source, [str(folder)]) if folder.is_dir() and not is_pipeline else []
    files = [adapters.AdapterFile(str(artifact))] if any(artifact.glob("*.safetensors")) else []
    loaded = adapters.load_adapters(backbone, files)
    strengths = [1.0] * len(files)
    with (
        controlnets.controlnets_applied(backbone, nets, [1.0] * len(nets)),
        adapters.adapters_applied(backbone, loaded, strengths, only_to_draw=True),
    ):
        yield backbone


@contextmanager
def base(source: Pretrained, device: torch.device) -> Iterator[Backbone]:
    """Context manager that yields the base backbone, without the artifact of a run."""
    backbone = source.load().to(device)
    backbone.prepare_for_device(device)
    yield backbone


def generate_images(backbone: Backbone, requests: Sequence[Request], sampling: Sampling) -> list[np.ndarray]:
    """Generate the requested images, under bfloat16 autocast if the device supports bfloat16 natively."""
    device_type = backbone.device.type
    use_bfloat16 = precision("auto", device_type) == "bf16-mixed"
    with torch.autocast(device_type, torch.bfloat16, enabled=use_bfloat16):
        return list(generate(backbone, requests, sampling))


def generate_base_images(
    source: Pretrained, requests: Sequence[Request], sampling: Sampling, device: torch.device
) -> list[np.ndarray]:
    """Generate images with the base backbone, cached on disk so that runs with the same backbone generate them once.

    The cache key includes the device type and the precision, because the images depend on them.
    """
    assert not any(request.maps for request in requests), "control maps are not part of the cache key"
    key = repr((source.image_cache_key(), device.type, precision("auto", device.type), sampling, list(requests)))
    file = cache_folder() / "base" / f"{hashlib.sha256(key.encode()).hexdigest()}.npy"
    file.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(file.with_suffix(".lock")):  # one of several concurrent jobs generates; the others wait
        if not file.exists():
            _draw_into(file, source, requests, sampling, device)
    return list(np.load(file))


def _draw_into(
    file: Path, source: Pretrained, requests: Sequence[Request], sampling: Sampling, device: torch.device
) -> None:
    with base(source, device) as backbone:
        images = np.stack(generate_images(backbone, requests, sampling))
    with replacing(file, sync=False, alone=True) as partial, partial.open("wb") as handle:
        np.save(handle, images)


def references(data: ImageDataModule) -> list[np.ndarray]:
    """Training images, center-cropped to their buckets: at most :data:`REFERENCES`, evenly spaced."""
    if len(data.train) > REFERENCES:
        log.info("evaluation: generated images are compared with %d of %d training images", REFERENCES, len(data.train))
    step = max(1, len(data.train) // REFERENCES)
    return [s.pixels(data.bucket(s), CENTER, False) for s in data.train[::step]][:REFERENCES]
