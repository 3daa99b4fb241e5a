"""Load LoRAs and embeddings of new tokens onto a backbone for sampling, with strengths, and unload them exactly."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from sdtune.backbone.backbone import Backbone
from sdtune.backbone.families import FAMILIES
from sdtune.backbone.layers import layers
from sdtune.backbone.new_tokens import check_vector_counts
from sdtune.backbone.quantization import Quantized
from sdtune.errors import UserError
from sdtune.files import is_snapshot
from sdtune.formats import KohyaTable, embeddings, read_lora
from sdtune.formats.diffusers_lora import FILE_NAME
from sdtune.formats.files import read_metadata, read_safetensors
from sdtune.formats.lora import LoRAWeights, canonical
from sdtune.formats.lora_names import BUNDLED
from sdtune.loaders.artifact import LoadedArtifact, warn_if_other_backbone

log = logging.getLogger("sdtune")


@dataclass(frozen=True)
class AdapterFile:
    """A LoRA file, an embedding file, or the ``artifact`` folder of a run, which can contain both.

    Args:
        strength: factor s of a LoRA in W' = W + s * alpha/r * B A; embeddings ignore it.
    """

    path: str
    strength: float = 1.0


@dataclass(frozen=True)
class LoadedLoRA(LoadedArtifact):
    """LoRA pairs with the module paths of the backbone, and the new tokens in the same file or folder."""

    weights: LoRAWeights
    words: embeddings.TokenVectors


def _modules(backbone: Backbone) -> dict[str, nn.Linear | nn.Conv2d]:
    """Canonical path (as in LoRA files) -> linear or convolution layer that a LoRA can change."""
    return {canonical(f"{component}.{name}"): layer for component, name, layer in layers(backbone)}


_OTHER_BACKBONE = "use the backbone that the adapter was trained with"


def check_adapter(path: str, backbone_hash: str, key: str = "adapters.path") -> None:
    """Check that ``path`` is an adapter, and warn if it was trained on another backbone; reads only file headers.

    Another backbone is not an error, since LoRAs are used on models derived from the one they were trained on. Shapes
    that do not fit are rejected by :func:`load_adapters`.

    Raises:
        UserError: ``path`` does not exist or contains no adapter.
    """
    local_path = Path(path).expanduser()
    if not local_path.exists():
        raise UserError(
            f"{path} does not exist", key=key, remedy="use a .safetensors file or the artifact folder of a run"
        )
    if (local_path / "config.json").is_file():
        raise UserError(f"{path} is a ControlNet or a full model", key=key, remedy="use control= for a ControlNet")
    files = (
        [local_path]
        if local_path.is_file()
        else sorted(f for f in local_path.glob("*.safetensors") if not _is_intermediate(f))
    )
    if not files:
        artifact = local_path / "artifact"
        remedy = f"use {artifact}" if artifact.is_dir() else "use the artifact folder of a run"
        raise UserError(f"{path} contains no .safetensors file", key=key, remedy=remedy)
    for file in files:
        warn_if_other_backbone(path, read_metadata(file).get("sdtune_backbone_hash", backbone_hash), backbone_hash)


def _is_intermediate(file: Path) -> bool:
    """Whether ``file`` is an intermediate embedding, which is ignored in a folder."""
    return file.stem.startswith(embeddings.FILE_NAME) and is_snapshot(file.stem)


def load_adapters(backbone: Backbone, files: Sequence[AdapterFile]) -> list[LoadedLoRA]:
    """Read ``files`` and add their new tokens to ``backbone``.

    Raises:
        UserError: a file does not fit the backbone, or two files contain the same token.
    """
    modules = _modules(backbone)
    table = FAMILIES[backbone.facts.family].kohya_table(modules, dict(backbone.unet.config))
    loaded = [_read(file, modules, table) for file in files]
    new_tokens: embeddings.TokenVectors = {}
    widths = [encoder.config.hidden_size for encoder in backbone.encoders.values()]
    for adapter in loaded:
        for token, vectors in adapter.words.items():
            vector_widths = [rows.shape[1] for rows in vectors]
            if vector_widths != widths:
                raise UserError(
                    f"{adapter.path}: embedding size is {_and(vector_widths)}, but this backbone has {_and(widths)}",
                    remedy="use the backbone that the file was trained with",
                )
            if token in new_tokens:
                raise UserError(
                    f"{adapter.path}: token {token!r} is already in another adapter", remedy="remove one of the two"
                )
            check_vector_counts({token: len(vectors[0])}, backbone.facts.max_tokens, f"adapters ({adapter.path})")
            new_tokens[token] = vectors
    if new_tokens:
        backbone.add_tokens(new_tokens)
    return loaded


def warn_about_unused_strengths(files: Sequence[AdapterFile], loaded: Sequence[LoadedLoRA]) -> None:
    """Log a warning for each of ``files`` that has a strength, but whose ``loaded`` adapter is only an embedding."""
    for file, adapter in zip(files, loaded, strict=True):
        if file.strength != 1 and not adapter.weights.pairs:
            log.warning("WARNING: adapters: strength %g has no effect on the embedding %s", file.strength, file.path)


def _and(widths: Sequence[int]) -> str:
    return " and ".join(map(str, widths))


def _read(
    file: AdapterFile,
    modules: Mapping[str, nn.Linear | nn.Conv2d],
    table: KohyaTable,
) -> LoadedLoRA:
    local_path = Path(file.path).expanduser()
    weights = LoRAWeights({}, {})
    if local_path.is_dir():
        new_tokens, has_pairs = embeddings.read_folder(local_path), (local_path / FILE_NAME).is_file()
    else:
        tensors, metadata = read_safetensors(local_path)
        new_tokens = embeddings.parse(local_path, tensors, metadata)
        has_pairs = any(key.startswith(BUNDLED) for key in tensors)
    if has_pairs or not new_tokens:
        weights, _ = read_lora(local_path, table)
    for path, (down, up) in weights.pairs.items():
        layer = modules.get(path)
        if layer is None:
            raise UserError(f"{file.path}: this backbone has no layer {path}", remedy=_OTHER_BACKBONE)
        shape = (up.shape[0], *down.shape[1:])
        if shape != tuple(layer.weight.shape) and down.shape[1:].numel() * up.shape[0] != layer.weight.numel():
            raise UserError(
                f"{file.path}: {path} is for weights of shape {list(shape)}, but this backbone has"
                f" {list(layer.weight.shape)}",
                remedy=_OTHER_BACKBONE,
            )
    return LoadedLoRA(file.path, weights, new_tokens)


def delta(down: Tensor, up: Tensor, scale: float, shape: torch.Size) -> Tensor:
    """Weight change scale * B A in ``shape``, float32. For convolutions A has the kernel size and B is 1x1."""
    product = scale * (up.float().flatten(1) @ down.float().flatten(1))
    return product.reshape(shape)


@contextmanager
def adapters_applied(
    backbone: Backbone, adapters: Sequence[LoadedLoRA], strengths: Sequence[float], *, only_to_draw: bool = False
) -> Iterator[None]:
    """Context manager that merges ``adapters`` into the weights, and restores the original weights exactly.

    Merged weights make sampling as fast as with the base model; the layers of a quantized backbone are dense then.
    Exception: with ``only_to_draw``, a single LoRA on a UNet that several runs share is not merged into it, so that the
    runs can generate images in one batch.

    Args:
        strengths: one factor per adapter.
        only_to_draw: whether the weights are used only to generate images.
    """
    modules = _modules(backbone)
    # The original weights wait in main memory, except those that other runs use.
    is_shared = backbone.pair_executor is not None
    originals: dict[str, Tensor] = {}
    quantized: list[Quantized] = []
    unmerged: dict[str, tuple[Tensor, Tensor, float]] = {}
    keep_unmerged = is_shared and only_to_draw and len(adapters) == 1
    names = {canonical(f"unet.{name}"): name for name, _ in backbone.unet.named_modules()} if keep_unmerged else {}
    try:
        for adapter, strength in zip(adapters, strengths, strict=True):
            if strength == 0:
                continue
            for path, (down, up) in adapter.weights.pairs.items():
                layer = modules[path]
                weight = layer.weight
                scale = strength * adapter.weights.alphas[path] / down.shape[0]
                if path in names:
                    unmerged[names[path]] = (down.float(), up.float(), scale)
                    continue
                change = delta(down.to(weight.device), up.to(weight.device), scale, weight.shape)
                merged = (weight.data.float() + change).to(weight.dtype)
                if isinstance(layer, Quantized):
                    layer.dense = merged
                    quantized.append(layer)
                    continue
                if path not in originals:
                    originals[path] = weight.data if is_shared else weight.data.cpu()
                weight.data = merged
        backbone.sampling_pairs = unmerged if keep_unmerged else None
        yield
    finally:
        backbone.sampling_pairs = None
        for path, original in originals.items():
            weight = modules[path].weight
            weight.data = original.to(weight.device)
        for quantized_layer in quantized:
            quantized_layer.dense = None
