"""Load LoRAs onto a backbone for sampling, with strengths, and unload them exactly."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from sdtune.backbone.backbone import Backbone
from sdtune.backbone.layers import layers, module_path
from sdtune.backbone.pretrained import Pretrained
from sdtune.backbone.quantization import Quantized
from sdtune.errors import UserError
from sdtune.files import is_snapshot
from sdtune.formats import embeddings, read_lora
from sdtune.formats.diffusers_lora import FILE_NAME
from sdtune.formats.files import read_metadata, read_safetensors
from sdtune.formats.lora import LoRAWeights
from sdtune.formats.lora_names import BUNDLED
from sdtune.loaders.artifact import ArtifactFile, LoadedArtifact, warn_if_other_backbone
from sdtune.loaders.words import LoadedWords, check_distinct, check_words

log = logging.getLogger("sdtune")


@dataclass(frozen=True)
class AdapterFile(ArtifactFile):
    """A LoRA file, an embedding file, or the ``artifact`` folder of a run, which can contain both.

    Args:
        strength: factor s of a LoRA in W' = W + s * alpha/r * B A; embeddings ignore it.
    """

    path: str
    strength: float = 1.0

    def check(self, source: Pretrained, key: str) -> None:
        check_adapter(self.path, source.hash(), key)

    def load(self, backbone: Backbone, source: Pretrained) -> list[LoadedArtifact]:
        """The words and the LoRA of the file; a warning if it has a strength, but no LoRA."""
        words, weights = _read(Path(self.path).expanduser(), _modules(backbone), backbone)
        if self.strength != 1 and not weights.pairs:
            log.warning("WARNING: adapters: strength %g has no effect on the embedding %s", self.strength, self.path)
        loaded: list[LoadedArtifact] = [LoadedLoRA(self.path, self.strength, weights)] if weights.pairs else []
        return [LoadedWords(self.path, self.strength, words), *loaded] if words else loaded


def _modules(backbone: Backbone) -> dict[str, nn.Linear | nn.Conv2d]:
    """Path in LoRA files -> linear or convolution layer that a LoRA can change."""
    return {module_path(backbone, component, name): layer for component, name, layer in layers(backbone)}


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


def _read(
    path: Path, modules: Mapping[str, nn.Linear | nn.Conv2d], backbone: Backbone
) -> tuple[embeddings.TokenVectors, LoRAWeights]:
    """Vectors of the new tokens, and LoRA pairs in ``path``; either may be empty.

    Raises:
        UserError: they do not fit the backbone.
    """
    weights = LoRAWeights({}, {})
    if path.is_dir():
        words, has_pairs = embeddings.read_folder(path), (path / FILE_NAME).is_file()
    else:
        tensors, metadata = read_safetensors(path)
        words = embeddings.parse(path, tensors, metadata)
        has_pairs = any(key.startswith(BUNDLED) for key in tensors)
    if has_pairs or not words:
        table = backbone.facts.family.kohya_table(modules, dict(backbone.denoiser.config))
        weights, _ = read_lora(path, table)
    for module, (down, up) in weights.pairs.items():
        layer = modules.get(module)
        if layer is None:
            raise UserError(f"{path}: this backbone has no layer {module}", remedy=_OTHER_BACKBONE)
        shape = (up.shape[0], *down.shape[1:])
        if shape != tuple(layer.weight.shape) and down.shape[1:].numel() * up.shape[0] != layer.weight.numel():
            raise UserError(
                f"{path}: {module} is for weights of shape {list(shape)}, but this backbone has"
                f" {list(layer.weight.shape)}",
                remedy=_OTHER_BACKBONE,
            )
    check_words(path, words, backbone)
    return words, weights


def load_adapters(backbone: Backbone, files: Sequence[AdapterFile], source: Pretrained) -> list[LoadedArtifact]:
    """Read ``files``.

    Raises:
        UserError: a file does not fit the backbone, or two files contain the same token.
    """
    artifacts = [artifact for file in files for artifact in file.load(backbone, source)]
    check_distinct(artifacts)
    return artifacts


def delta(down: Tensor, up: Tensor, scale: float, shape: torch.Size) -> Tensor:
    """Weight change scale * B A in ``shape``, float32. For convolutions A has the kernel size and B is 1x1."""
    product = scale * (up.float().flatten(1) @ down.float().flatten(1))
    return product.reshape(shape)


@dataclass(frozen=True)
class LoadedLoRA(LoadedArtifact):
    """LoRA pairs with the module paths of the backbone."""

    weights: LoRAWeights

    @contextmanager
    def applied(self, backbone: Backbone, factor: float = 1.0, *, only_to_draw: bool = False) -> Iterator[None]:
        """Context manager that merges the pairs into the weights, and restores the original weights exactly.

        Merged weights make sampling as fast as with the base model; the layers of a quantized backbone are dense then.
        Exception: with ``only_to_draw``, the LoRA is not merged into a denoiser that several runs share, so that the
        runs can generate images in one batch.
        """
        strength = self.strength * factor
        # The original weights wait in main memory, except those that other runs use.
        is_shared = backbone.pair_executor is not None
        originals: dict[str, Tensor] = {}
        dense: list[tuple[Quantized, Tensor | None]] = []
        modules = _modules(backbone) if strength else {}
        unmerged = self._unmerged(backbone, strength) if is_shared and only_to_draw else None
        try:
            for path, (down, up) in self.weights.pairs.items() if strength else ():
                if unmerged is not None and path.startswith(f"{backbone.facts.family.denoiser}."):
                    continue
                layer = modules[path]
                weight, scale = layer.weight, strength * self.weights.alphas[path] / down.shape[0]
                change = delta(down.to(weight.device), up.to(weight.device), scale, weight.shape)
                merged = (weight.data.float() + change).to(weight.dtype)
                if isinstance(layer, Quantized):
                    dense.append((layer, layer.dense))
                    layer.dense = merged
                    continue
                originals[path] = weight.data if is_shared else weight.data.cpu()
                weight.data = merged
            if unmerged is not None:
                assert backbone.sampling_pairs is None, "one LoRA at a time on a shared denoiser"
                backbone.sampling_pairs = unmerged
            yield
        finally:
            if unmerged is not None:
                backbone.sampling_pairs = None
            for path, original in originals.items():
                weight = modules[path].weight
                weight.data = original.to(weight.device)
            for quantized_layer, previous in dense:
                quantized_layer.dense = previous

    def _unmerged(self, backbone: Backbone, strength: float) -> dict[str, tuple[Tensor, Tensor, float]]:
        """The pairs of the denoiser by its module names; none at strength 0."""
        names = {module_path(backbone, "denoiser", name): name for name, _ in backbone.denoiser.named_modules()}
        return {
            names[path]: (down.float(), up.float(), strength * self.weights.alphas[path] / down.shape[0])
            for path, (down, up) in (self.weights.pairs.items() if strength else ())
            if path in names
        }
