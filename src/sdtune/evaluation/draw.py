"""Images of a run's artifact, and of the model without it."""

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
from sdtune.images.files import CENTRE
from sdtune.loaders import controlnet as controlnets
from sdtune.loaders import lora as adapters
from sdtune.paths import cache_folder
from sdtune.sampling.loop import Request, Sampling, generate

log = logging.getLogger("sdtune")

REFERENCES = 64
"""Training images that stand for the subject, at most."""


@contextmanager
def trained(source: Pretrained, artifact: Path, name: str, device: torch.device) -> Iterator[Backbone]:
    """The backbone with the artifact of a run: what others load is what is measured, not the weights in memory."""
    whole = artifact / name
    pipeline = (whole / "model_index.json").is_file()
    own = source.trained(whole) if pipeline else source
    backbone = own.load().to(device)
    backbone.prepare_for_device(device)
    nets = controlnets.load_controlnets(backbone, source, [str(whole)]) if whole.is_dir() and not pipeline else []
    files = [adapters.AdapterFile(str(artifact))] if any(artifact.glob("*.safetensors")) else []
    loaded = adapters.load_adapters(backbone, files)
    full = [1.0] * len(files)
    with (
        controlnets.controlnets_applied(backbone, nets, [1.0] * len(nets)),
        adapters.adapters_applied(backbone, loaded, full, only_to_draw=True),
    ):
        yield backbone


@contextmanager
def base(source: Pretrained, device: torch.device) -> Iterator[Backbone]:
    """The backbone as it was."""
    backbone = source.load().to(device)
    backbone.prepare_for_device(device)
    yield backbone


def draw_images(backbone: Backbone, requests: Sequence[Request], sampling: Sampling) -> list[np.ndarray]:
    """The requested images, in bfloat16 where the device multiplies it itself."""
    kind = backbone.device.type
    half = precision("auto", kind) == "bf16-mixed"
    with torch.autocast(kind, torch.bfloat16, enabled=half):
        return list(generate(backbone, requests, sampling))


def draw_base(
    source: Pretrained, requests: Sequence[Request], sampling: Sampling, device: torch.device
) -> list[np.ndarray]:
    """What the backbone draws as it was; kept by content, so that runs on one backbone draw it once.

    The drawing hangs on the device's kind and precision too, and these name it.
    """
    assert not any(request.maps for request in requests), "maps are not in the name"
    wanted = repr((source.drawing_key(), device.type, precision("auto", device.type), sampling, list(requests)))
    file = cache_folder() / "base" / f"{hashlib.sha256(wanted.encode()).hexdigest()}.npy"
    file.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(file.with_suffix(".lock")):  # of jobs side by side one draws, and the others wait
        if not file.exists():
            _draw_into(file, source, requests, sampling, device)
    return list(np.load(file))


def _draw_into(
    file: Path, source: Pretrained, requests: Sequence[Request], sampling: Sampling, device: torch.device
) -> None:
    with base(source, device) as backbone:
        images = np.stack(draw_images(backbone, requests, sampling))
    with replacing(file, sync=False, alone=True) as partial, partial.open("wb") as handle:
        np.save(handle, images)


def references(data: ImageDataModule) -> list[np.ndarray]:
    """Training images as they are trained, at most :data:`REFERENCES` of them, spread over all."""
    if len(data.train) > REFERENCES:
        log.info("evaluation: compared with %d of %d training images", REFERENCES, len(data.train))
    step = max(1, len(data.train) // REFERENCES)
    return [s.pixels(data.bucket(s), CENTRE, False) for s in data.train[::step]][:REFERENCES]
