"""``RunModels``: the base model and the trained model of a run, to generate images for an evaluation."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock

from sdtune.backbone import Pretrained
from sdtune.backbone.backbone import Backbone
from sdtune.files import mark_used, replacing
from sdtune.hardware.precision import generation_dtype, precision
from sdtune.loaders.artifact import LoadedArtifact, artifacts_applied
from sdtune.loaders.controlnet import load_applicable_controlnet
from sdtune.loaders.lora import AdapterFile, load_adapters
from sdtune.paths import cache_folder
from sdtune.progress import track
from sdtune.sampling.load import load_to_generate, place_to_generate
from sdtune.sampling.loop import Request, Sampling, generate


class RunModels:
    """The base model and the trained model of a run; at most one of them is in memory.

    On a device other than the CPU, they generate in half precision (:func:`sdtune.sampling.load.place_to_generate`).

    Args:
        source: the backbone of the run.
        artifact: the artifact folder of the run; it is always read from its files.
        name: name of the artifact.
        device: device that generates the images.
        vae_tiling: decode large images in tiles.
        weights: the weights of ``source``, already in memory; None: they are read from its files.
    """

    def __init__(
        self,
        source: Pretrained,
        artifact: Path,
        name: str,
        device: torch.device,
        *,
        vae_tiling: bool = False,
        weights: Backbone | None = None,
    ) -> None:
        self.source, self.artifact, self.name, self.device = source, artifact, name, device
        self._vae_tiling, self._weights = vae_tiling, weights
        self._base: Backbone | None = None

    @contextmanager
    def base(self) -> Iterator[Backbone]:
        """Context manager that yields the base model, without the artifact."""
        if self._base is None:
            dtype = generation_dtype(self.device)
            # Half weights of another type would be rounded twice, and the base images of all runs must be equal.
            if self._weights is not None and self._weights.denoiser.dtype in (torch.float32, dtype):
                weights, self._weights = self._weights, None
                self._base = place_to_generate(weights, self.device, dtype, vae_tiling=self._vae_tiling)
            else:
                self._base = load_to_generate(self.source, self.device, dtype, vae_tiling=self._vae_tiling)
        yield self._base

    @contextmanager
    def trained(self) -> Iterator[Backbone]:
        """Context manager that yields the model with the artifact, loaded from its files."""
        folder = self.artifact / self.name
        if (folder / "model_index.json").is_file():
            self.release()
            trained = self.source.of_trained_pipeline(folder)
            dtype = generation_dtype(self.device)
            backbone = load_to_generate(trained, self.device, dtype, vae_tiling=self._vae_tiling)
            with artifacts_applied(backbone, self._adapters(backbone), only_to_draw=True):
                yield backbone
            return
        with self.base() as backbone:
            net = [load_applicable_controlnet(backbone, self.source, str(folder))] if folder.is_dir() else []
            with artifacts_applied(backbone, [*net, *self._adapters(backbone)], only_to_draw=True):
                yield backbone

    def _adapters(self, backbone: Backbone) -> list[LoadedArtifact]:
        files = [AdapterFile(str(self.artifact))] if any(self.artifact.glob("*.safetensors")) else []
        return load_adapters(backbone, files, self.source)

    def release(self) -> None:
        """Free the memory of the model; it is loaded again when it is needed."""
        self._base = self._weights = None
        if self.device.type != "cpu":
            getattr(torch, self.device.type).empty_cache()

    def base_images(self, requests: Sequence[Request], sampling: Sampling) -> list[np.ndarray]:
        """Generate images with the base model, cached on disk so that runs with the same backbone generate them once.

        The cache key includes the device type and the precision, because the images depend on them.
        """
        assert not any(request.conditions for request in requests), "conditions are not part of the cache key"
        settings = (self.source.image_cache_key(), self.device.type, precision("auto", self.device.type))
        half = () if self.device.type == "cpu" else (str(generation_dtype(self.device)),)
        key = repr((*settings, sampling, list(requests), *half))
        file = cache_folder() / "base" / f"{hashlib.sha256(key.encode()).hexdigest()}.npy"
        file.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(file.with_suffix(".lock")):  # one of several concurrent jobs generates; the others wait
            if file.exists():
                mark_used(file)
            else:
                self._draw_into(file, requests, sampling)
        return list(np.load(file))

    def _draw_into(self, file: Path, requests: Sequence[Request], sampling: Sampling) -> None:
        with self.base() as backbone:
            images = np.stack(generate_images(backbone, requests, sampling))
        with replacing(file, sync=False, alone=True) as partial, partial.open("wb") as handle:
            np.save(handle, images)

    def trained_images(self, requests: Sequence[Request], sampling: Sampling) -> list[np.ndarray]:
        """Generate images with the trained model."""
        with self.trained() as backbone:
            return generate_images(backbone, requests, sampling)


def generate_images(backbone: Backbone, requests: Sequence[Request], sampling: Sampling) -> list[np.ndarray]:
    """Generate the requested images.

    Float32 weights are used under bfloat16 autocast if the device supports bfloat16. So are the float32 LoRA pairs of
    a run that shares its backbone, in the dtype of the backbone.
    """
    device_type, dtype = backbone.device.type, backbone.denoiser.dtype
    is_float32 = dtype == torch.float32
    enabled = precision("auto", device_type) == "bf16-mixed" if is_float32 else backbone.pair_executor is not None
    with torch.autocast(device_type, torch.bfloat16 if is_float32 else dtype, enabled=enabled):
        return list(track("Images of the evaluation", generate(backbone, requests, sampling), len(requests)))
