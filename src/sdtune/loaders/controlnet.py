"""Load ControlNets onto a backbone for sampling, with strengths, and unload them exactly."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from diffusers import ControlNetModel
from PIL import Image
from torch import Tensor

from sdtune.backbone import Pretrained
from sdtune.backbone.backbone import Backbone
from sdtune.backbone.controlnet import Net
from sdtune.backbone.controlnet_files import WEIGHTS, embedding_widths, find_controlnet, load_controlnet
from sdtune.config.schema import check_value
from sdtune.data.control.base import Computed, Resample, fit
from sdtune.errors import UserError
from sdtune.formats import read_safetensors
from sdtune.images.files import open_image, resize_and_crop
from sdtune.loaders.artifact import LoadedArtifact, warn_of_another_backbone


@dataclass(frozen=True)
class ControlImage:
    """A net's folder and the image that steers it.

    Args:
        path: a ControlNet in the diffusers layout.
        image: a map, or an image that ``preprocess`` makes one of; its file, or the image itself.
        strength: factor on the net's residuals.
        preprocess: how a map is made of the image, as it is in training by default; the image is the map if None.
        resample: how a map is brought to the wanted size; nearest for segmentation.
    """

    path: str
    image: str | Image.Image
    strength: float = 1.0
    preprocess: Literal["canny", "scribble"] | None = None
    resample: Resample = "bilinear"

    def read_image(self) -> Image.Image:
        """Mode RGB; UserError where there is none."""
        if isinstance(self.image, Image.Image):
            return self.image.convert("RGB")
        file = Path(self.image).expanduser()
        if not file.is_file():
            raise UserError(f"{self.image} does not exist", key="control.image", remedy="name an image file")
        return open_image(file, "control.image")

    def map(self, size: tuple[int, int]) -> np.ndarray:
        """uint8 [H, W, 3]: the image scaled to cover ``size`` (width, height) and cropped at the centre."""
        if self.preprocess is None:
            return fit(self.read_image(), size, resample=self.resample)
        return _computed(self.preprocess).extract(resize_and_crop(self.read_image(), size))


@cache
def _computed(name: str) -> Computed:
    from sdtune.data.control.edges import Canny, Scribble  # OpenCV is only loaded where it is used

    return Canny() if name == "canny" else Scribble()


def read_control_image(
    entry: Mapping[str, Any], key: str, image: str | Path | Image.Image | None = None
) -> ControlImage:
    """What a user wrote as ``key``; ``image`` stands in for an entry that names none."""
    merged = {**({} if image is None else {"image": image}), **entry}
    given: dict[str, Any] = {name: str(v) if isinstance(v, Path) else v for name, v in merged.items()}
    hints = {
        "path": str,
        "image": str | Image.Image,
        "strength": float,
        "preprocess": Literal["canny", "scribble"] | None,
        "resample": Resample,
    }
    unknown, missing = sorted(given.keys() - hints.keys()), [k for k in ("path", "image") if k not in given]
    if unknown or missing:
        odd = f"{unknown[0]} is not known" if unknown else f"{missing[0]} is missing"
        raise UserError(odd, key=key, remedy="write {path: NET, image: FILE, strength: 1.0, preprocess: canny}")
    for name, value in given.items():
        check_value(value, hints[name], f"{key}.{name}")
    return ControlImage(**given)


def check_controlnet(path: str, source: Pretrained, preprocess: str | None = None) -> None:
    """UserError where there is no ControlNet, or one that does not fit ``source``; loads no weights.

    Also where it has learned from other maps than ``preprocess`` makes; of a map that is given as it is nobody knows.
    """
    folder = find_controlnet(path, "control.path", source.config("unet"), source.facts.factor)
    learned = _facts(folder).get("preprocess", preprocess)
    if preprocess is not None and learned != preprocess:
        right = f"give preprocess: {learned}" if learned else "give the map itself as image, and leave preprocess out"
        raise UserError(f"{preprocess}, but {path} has learned from other maps; {right}", key="control.preprocess")
    warn_of_another_backbone(f"control.path: {path}", _facts(folder).get("backbone", source.hash()), source.hash())


def _facts(folder: Path) -> dict[str, Any]:
    """What sdtune wrote beside the net; nothing where another program did."""
    file = folder / "sdtune.json"
    facts: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    return facts


@dataclass(frozen=True)
class LoadedControlNet(LoadedArtifact):
    """A net on the backbone's device, and the weights of the UNet that was trained along with it, if one was."""

    model: ControlNetModel
    unet: dict[str, Tensor]


def load_controlnets(backbone: Backbone, source: Pretrained, paths: Sequence[str]) -> list[LoadedControlNet]:
    """Read the nets in ``paths``, in float32."""
    loaded = []
    for path in paths:
        folder = find_controlnet(path, "control.path", source.config("unet"), source.facts.factor)
        model = load_controlnet(folder, "control.path", backbone.unet, embedding_widths(source.facts.factor))
        model = model.to(backbone.device).eval().requires_grad_(False)
        backbone.prepare_for_device(backbone.device, model)
        own = folder / "unet" / WEIGHTS
        loaded.append(LoadedControlNet(path, model, read_safetensors(own)[0] if own.is_file() else {}))
    return loaded


@contextmanager
def controlnets_applied(
    backbone: Backbone, nets: Sequence[LoadedControlNet], strengths: Sequence[float]
) -> Iterator[None]:
    """Within it, ``backbone`` samples under ``nets``, and with the UNet that one of them brings."""
    bringing = [net for net, strength in zip(nets, strengths, strict=True) if net.unet and strength]
    if len(bringing) > 1:
        raise UserError(
            f"{bringing[0].path} and {bringing[1].path} each bring a UNet of their own",
            key="control",
            remedy="use one of them",
        )
    own = {name: p.data for name, p in backbone.unet.named_parameters()} if bringing else {}
    try:
        for name in own:
            weight = backbone.unet.get_parameter(name)
            weight.data = bringing[0].unet[name].to(weight.device, weight.dtype)
        backbone.nets = tuple(Net(net.model, strength) for net, strength in zip(nets, strengths, strict=True))
        yield
    finally:
        backbone.nets = ()
        for name, value in own.items():
            backbone.unet.get_parameter(name).data = value
