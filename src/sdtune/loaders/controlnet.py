"""Load ControlNets onto a backbone for sampling, with strengths, and restore the original weights exactly."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image
from torch import Tensor, nn

from sdtune.backbone import Pretrained
from sdtune.backbone.backbone import Backbone
from sdtune.backbone.controlnet import CONTROLNET_WEIGHTS, ControlNetWithStrength
from sdtune.backbone.loading import controlnets_of
from sdtune.backbone.quantization import Quantized
from sdtune.config.schema import check_value
from sdtune.data.control.base import Computed, Resample, fit
from sdtune.errors import UserError
from sdtune.files import read_json
from sdtune.formats import read_safetensors
from sdtune.images.files import open_image, resize_and_crop
from sdtune.loaders.artifact import ArtifactFile, LoadedArtifact, warn_if_other_backbone


@dataclass(frozen=True)
class ControlImage(ArtifactFile):
    """A ControlNet and its conditioning image.

    Args:
        path: folder of a ControlNet in the diffusers layout, or a single file.
        image: a control map, or an image from which ``preprocess`` computes one; a file or the image itself.
        strength: factor on the residuals of the ControlNet.
        preprocess: edge detector for the map, with the default settings of training; None: ``image`` is the map.
        resample: interpolation of a map to the size of the image; use nearest for segmentation.
        name: name of the condition; different for each of several ControlNets.
    """

    path: str
    image: str | Image.Image
    strength: float = 1.0
    preprocess: Literal["canny", "scribble"] | None = None
    resample: Resample = "bilinear"
    name: str = "control"

    def check(self, source: Pretrained, key: str) -> None:
        self.read_image()
        check_controlnet(self.path, source, self.preprocess)

    def load(self, backbone: Backbone, source: Pretrained) -> list[LoadedArtifact]:
        return [load_applicable_controlnet(backbone, source, self.path, self.strength, self.name)]

    def conditions(self, size: tuple[int, int]) -> Mapping[str, np.ndarray]:
        return {self.name: self.map(size)}

    def read_image(self) -> Image.Image:
        """The image in mode RGB.

        Raises:
            UserError: the file is missing or is not an image.
        """
        if isinstance(self.image, Image.Image):
            return self.image.convert("RGB")
        file = Path(self.image).expanduser()
        if not file.is_file():
            raise UserError(f"{self.image} does not exist", key="control.image", remedy="set it to an image file")
        return open_image(file, "control.image")

    def map(self, size: tuple[int, int]) -> np.ndarray:
        """Control map uint8 [H, W, 3]: the image, scaled to cover ``size`` (width, height) and center-cropped."""
        if self.preprocess is None:
            return fit(self.read_image(), size, resample=self.resample)
        return _computed(self.preprocess).extract(resize_and_crop(self.read_image(), size))


@cache
def _computed(name: str) -> Computed:
    from sdtune.data.control.edges import Canny, Scribble  # imports OpenCV

    return Canny() if name == "canny" else Scribble()


def read_control_images(
    entries: Sequence[Mapping[str, Any]], image: str | Path | Image.Image | None = None
) -> list[ControlImage]:
    """Check the entries of the setting ``control`` and convert them.

    Args:
        image: the image of entries without one.

    Raises:
        UserError: an unknown or missing key, or a value of the wrong type.
    """
    images = [_control_image(entry, f"control[{i}]", image) for i, entry in enumerate(entries)]
    return [replace(one, name=f"control{i + 1}") if i else one for i, one in enumerate(images)]


def _control_image(entry: Mapping[str, Any], key: str, image: str | Path | Image.Image | None) -> ControlImage:
    merged = {**({} if image is None else {"image": image}), **entry}
    options: dict[str, Any] = {name: str(v) if isinstance(v, Path) else v for name, v in merged.items()}
    hints = {
        "path": str,
        "image": str | Image.Image,
        "strength": float,
        "preprocess": Literal["canny", "scribble"] | None,
        "resample": Resample,
    }
    unknown, missing = sorted(options.keys() - hints.keys()), [k for k in ("path", "image") if k not in options]
    if unknown or missing:
        message = f"unknown key {unknown[0]}" if unknown else f"{missing[0]} is missing"
        raise UserError(message, key=key, remedy="use {path: NET, image: FILE, strength: 1.0, preprocess: canny}")
    for name, value in options.items():
        check_value(value, hints[name], f"{key}.{name}")
    return ControlImage(**options)


def _find(path: str, source: Pretrained) -> Path:
    kind = controlnets_of(source.facts.family)
    return kind.find(path, "control.path", source.config(source.denoiser_folder), source.facts)


def check_controlnet(path: str, source: Pretrained, preprocess: str | None = None) -> None:
    """Check that ``path`` is a ControlNet that fits ``source`` and ``preprocess``, without loading weights.

    Without ``preprocess`` the kind of the map is unknown and not checked.

    Raises:
        UserError: there is no ControlNet, it does not fit the denoiser, or it was trained with other control maps.
    """
    folder = _find(path, source)
    trained_with = _facts(folder).get("preprocess", preprocess)
    if preprocess is not None and trained_with != preprocess:
        remedy = (
            f"set preprocess: {trained_with}" if trained_with else "set image to a control map and remove preprocess"
        )
        raise UserError(
            f"{preprocess}, but {path} was trained with other control maps", key="control.preprocess", remedy=remedy
        )
    warn_if_other_backbone(f"control.path: {path}", _facts(folder).get("backbone", source.hash()), source.hash())


def _facts(folder: Path) -> dict[str, Any]:
    """Content of ``sdtune.json`` next to the ControlNet; empty for a ControlNet of another program."""
    file = folder / "sdtune.json"
    return read_json(file, "control.path") if file.is_file() else {}


@dataclass(frozen=True)
class LoadedControlNet(LoadedArtifact):
    """A ControlNet on the device of the backbone.

    Args:
        name: name of its condition.
        denoiser: weights of the denoiser that were trained together with the ControlNet; empty if there are none.
    """

    name: str
    model: Any
    denoiser: dict[str, Tensor]

    @property
    def replaces_denoiser(self) -> bool:  # type: ignore[override]
        return bool(self.denoiser)

    @contextmanager
    def applied(self, backbone: Backbone, factor: float = 1.0, *, only_to_draw: bool = False) -> Iterator[None]:
        """Context manager that adds the ControlNet to ``backbone``, with the denoiser weights that it contains.

        At strength 0 it does nothing, so that it costs nothing.
        """
        strength, conditioners = self.strength * factor, backbone.conditioners
        weights = self.denoiser if strength else {}
        modules = backbone.denoiser.named_modules() if weights else ()
        quantized = {f"{name}.weight": module for name, module in modules if isinstance(module, Quantized)}
        stored = {id(parameter) for module in quantized.values() for parameter in (module.packed, module.scales)}
        parameters = backbone.denoiser.named_parameters() if weights else ()
        original_weights = {name: p.data.cpu() for name, p in parameters if id(p) not in stored}
        try:
            for name, layer in quantized.items():
                layer.dense = weights[name].to(backbone.device, layer.dtype)
            for name in original_weights:
                weight = backbone.denoiser.get_parameter(name)
                weight.data = weights[name].to(weight.device, weight.dtype)
            if strength:
                backbone.conditioners = (*conditioners, ControlNetWithStrength(self.name, self.model, strength))
            yield
        finally:
            backbone.conditioners = conditioners
            for name, value in original_weights.items():
                parameter = backbone.denoiser.get_parameter(name)
                parameter.data = value.to(parameter.device)
            for layer in quantized.values():
                layer.dense = None


def load_applicable_controlnet(
    backbone: Backbone, source: Pretrained, path: str, strength: float = 1.0, name: str = "control"
) -> LoadedControlNet:
    """Read the ControlNet in ``path``, in the dtype of the backbone's denoiser.

    Raises:
        UserError: ``path`` is not a ControlNet that fits the backbone.
    """
    folder = _find(path, source)
    model = backbone.controlnets.load(folder, "control.path", backbone)
    # diffusers' own to() warns of modules to keep in float32, even if there are none.
    nn.Module.to(model, backbone.device, backbone.denoiser.dtype).eval().requires_grad_(False)
    backbone.prepare_for_device(backbone.device, model)
    file = folder / source.denoiser_folder / CONTROLNET_WEIGHTS
    denoiser = read_safetensors(file)[0] if file.is_file() else {}
    return LoadedControlNet(path, strength, name, model, denoiser)
