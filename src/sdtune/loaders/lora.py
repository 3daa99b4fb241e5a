"""Load LoRAs and learned words onto a backbone for sampling, with strengths, and unload them exactly."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sdtune.backbone.backbone import Backbone
from sdtune.backbone.layers import layers
from sdtune.errors import UserError
from sdtune.formats import embeddings, read_lora
from sdtune.formats.diffusers_lora import FILE_NAME
from sdtune.formats.files import read_metadata, read_safetensors
from sdtune.formats.lora import LoRAWeights, canonical
from sdtune.loaders.artifact import LoadedArtifact, warn_of_another_backbone


@dataclass(frozen=True)
class AdapterFile:
    """A file of a LoRA or of a learned word, or a run's ``artifact`` folder that holds either or both.

    ``strength`` is how strongly a LoRA acts, alpha of W' = W + strength * alpha/r * BA; a word has none.
    """

    path: str
    strength: float = 1.0


@dataclass(frozen=True)
class LoadedLoRA(LoadedArtifact):
    """An adapter's pairs with the module paths of the backbone at hand, and the words in its file."""

    weights: LoRAWeights
    words: embeddings.Words


def _modules(backbone: Backbone) -> dict[str, nn.Linear | nn.Conv2d]:
    """Sites that a file may name, by the path that clients use."""
    return {canonical(f"{component}.{name}"): layer for component, name, layer in layers(backbone)}


def check_file(path: str, backbone_hash: str, key: str = "adapters.path") -> None:
    """UserError where there is no adapter; a warning for one of another backbone; reads headers alone.

    A LoRA is used on models that were made from its own, and whether it suits one shows in the images. One that does
    not fit is refused by its shapes.
    """
    place = Path(path).expanduser()
    if not place.exists():
        raise UserError(f"{path} does not exist", key=key, remedy="name a .safetensors file or a run's artifact folder")
    if (place / "config.json").is_file():
        raise UserError(f"{path} holds a ControlNet or another whole model; a ControlNet goes to control=", key=key)
    files = [place] if place.is_file() else sorted(f for f in place.glob("*.safetensors") if not _passed_over(f))
    if not files:
        raise UserError(f"{path} holds no .safetensors file", key=key, remedy="name a run's artifact folder")
    for file in files:
        warn_of_another_backbone(path, read_metadata(file).get("sdtune_backbone_hash", backbone_hash), backbone_hash)


def _passed_over(file: Path) -> bool:
    """Whether it is an intermediate word's, which a folder's last ones stand in for."""
    return file.stem.startswith(embeddings.FILE_NAME) and embeddings.intermediate(file.stem)


def load_adapters(backbone: Backbone, files: Sequence[AdapterFile]) -> list[LoadedLoRA]:
    """Read ``files`` and have ``backbone`` understand the words in them.

    Raises:
        UserError: one does not fit this backbone, or brings a word that another brought.
    """
    modules = _modules(backbone)
    xl = dict(backbone.unet.config) if backbone.facts.family == "sdxl" else None
    loaded = [_read(file, modules, xl) for file in files]
    words: embeddings.Words = {}
    widths = [encoder.config.hidden_size for encoder in backbone.encoders.values()]
    for adapter in loaded:
        for token, vectors in adapter.words.items():
            theirs = [rows.shape[1] for rows in vectors]
            if theirs != widths:
                raise UserError(
                    f"{adapter.path}: vectors of {_and(theirs)} numbers; this backbone's have {_and(widths)}"
                )
            if token in words:
                raise UserError(f"{adapter.path}: the word {token!r} comes from another adapter already")
            words[token] = vectors
    if words:
        backbone.add_tokens(words)
    return loaded


def _and(widths: Sequence[int]) -> str:
    return " and ".join(map(str, widths))


def _read(
    file: AdapterFile,
    modules: Mapping[str, nn.Linear | nn.Conv2d],
    xl: Mapping[str, Any] | None,
) -> LoadedLoRA:
    place = Path(file.path).expanduser()
    weights = LoRAWeights({}, {})
    words = embeddings.read_folder(place) if place.is_dir() else embeddings.parse(place, *read_safetensors(place))
    if (place / FILE_NAME).is_file() or not words:
        weights, _ = read_lora(place, modules, xl)
    for path, (down, up) in weights.pairs.items():
        site = modules.get(path)
        if site is None:
            raise UserError(f"{file.path}: {path} is not a layer of this backbone; it belongs to another one")
        theirs_shape = (up.shape[0], *down.shape[1:])
        if theirs_shape != tuple(site.weight.shape) and down.shape[1:].numel() * up.shape[0] != site.weight.numel():
            raise UserError(
                f"{file.path}: {path} is for weights {list(theirs_shape)}, this backbone's are"
                f" {list(site.weight.shape)}; it belongs to another one"
            )
    return LoadedLoRA(file.path, weights, words)


def delta(down: Tensor, up: Tensor, scale: float, shape: torch.Size) -> Tensor:
    """scale * B A as a weight of ``shape``, in float32; for convolutions B is 1x1 and A has the kernel."""
    product = scale * (up.float().flatten(1) @ down.float().flatten(1))
    return product.reshape(shape)


@contextmanager
def adapters_applied(
    backbone: Backbone, adapters: Sequence[LoadedLoRA], strengths: Sequence[float], *, only_to_draw: bool = False
) -> Iterator[None]:
    """Within it, the backbone's weights hold the adapters at ``strengths``; afterwards they are what they were.

    Merged rather than kept as branches: sampling then costs what the base costs. Only where images are all that is
    wanted of it, one LoRA on a UNet that several runs share stays beside the weights, so that they draw together.
    """
    modules = _modules(backbone)
    kept: dict[str, Tensor] = {}
    beside: dict[str, tuple[Tensor, Tensor, float]] = {}
    stays = backbone.pair_executor is not None and only_to_draw and len(adapters) == 1
    names = {canonical(f"unet.{name}"): name for name, _ in backbone.unet.named_modules()} if stays else {}
    try:
        for adapter, strength in zip(adapters, strengths, strict=True):
            if strength == 0:
                continue
            for path, (down, up) in adapter.weights.pairs.items():
                weight = modules[path].weight
                scale = strength * adapter.weights.alphas[path] / down.shape[0]
                if path in names:
                    beside[names[path]] = (down.float(), up.float(), scale)
                    continue
                kept.setdefault(path, weight.data)
                change = delta(down.to(weight.device), up.to(weight.device), scale, weight.shape)
                weight.data = (weight.data.float() + change).to(weight.dtype)
        backbone.drawing_pairs = beside if stays else None
        yield
    finally:
        backbone.drawing_pairs = None
        for path, own in kept.items():
            modules[path].weight.data = own
