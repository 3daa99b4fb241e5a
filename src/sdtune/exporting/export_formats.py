"""Export formats (diffusers, kohya, pipeline folder, single file), with LoRA merging, extraction and rank reduction."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, get_args

import torch
from annotated_types import Ge, Interval
from torch import Tensor

from sdtune.backbone.backbone import Backbone
from sdtune.backbone.controlnet import CONTROLNET_WEIGHTS
from sdtune.backbone.families import model_spec_prediction
from sdtune.backbone.layers import layers, module_path
from sdtune.backbone.loading import controlnets_of
from sdtune.backbone.pretrained import Pretrained
from sdtune.errors import UserError
from sdtune.exporting.artifact import Artifact, Kind
from sdtune.exporting.card import write_export_card
from sdtune.exporting.models import cast_tensors, write_pipeline, write_single_file
from sdtune.exporting.previews import thumbnail
from sdtune.files import read_json, replacing, write_json
from sdtune.formats import (
    LoRAWeights,
    diffusers_lora,
    embeddings,
    factors,
    kohya_lora,
    write_safetensors,
)
from sdtune.formats.files import read_metadata, read_safetensors
from sdtune.loaders.lora import AdapterFile, LoadedLoRA, check_adapter

log = logging.getLogger("sdtune")

Format = Literal["diffusers", "kohya", "pipeline", "single_file"]
Dtype = Literal["fp16", "bf16", "fp32"]

DTYPES: dict[Dtype, torch.dtype] = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}

FORMATS: dict[Kind, tuple[Format, ...]] = {
    "lora": get_args(Format),
    "embeddings": ("diffusers", "kohya"),
    "controlnet": ("diffusers", "single_file"),
    "model": get_args(Format),
}
"""Export formats of each kind of artifact."""

_SET_BASE_MODEL = "set backbone.path to the model that its training started from"


@dataclass(frozen=True)
class Export:
    """Settings of an export.

    Args:
        format: ``diffusers``: the format that diffusers loads; ``kohya``: a LoRA for A1111, ComfyUI and kohya's tools,
            an embedding for A1111, or a LoRA extracted from a full model (its difference from the backbone);
            ``pipeline`` and ``single_file``: a full model, with a LoRA merged into it.
        dtype: dtype of the tensors.
        strength: strength at which a LoRA is merged.
        rank: rank of a reduced LoRA, or of a LoRA extracted from a model.
        energy: share of the squared singular values to keep in each module.
        alpha: alpha of the kohya format: ``kept`` as trained, or ``folded`` into the matrices (alpha = rank).
        thumbnail: put the first preview into the header of a single file.
    """

    format: Format
    dtype: Dtype = "fp16"
    strength: float = 1.0
    rank: Annotated[int, Ge(1)] | None = None
    energy: Annotated[float, Interval(gt=0, le=1)] | None = None
    alpha: Literal["kept", "folded"] = "kept"
    thumbnail: bool = False

    def check(self, artifact: Artifact) -> None:
        """Raise UserError if ``artifact`` cannot be exported with these settings."""
        known = FORMATS[artifact.kind]
        if self.format not in known:
            raise UserError(
                f"an artifact of kind {artifact.kind} has no format {self.format}",
                key="format",
                remedy=f"set format={' or '.join(known)}",
            )
        lora = self.format == "kohya" or (self.format == "diffusers" and artifact.kind == "lora")
        svd = next((key for key in ("rank", "energy") if getattr(self, key) is not None), None)
        if svd is not None and not (lora and artifact.kind in ("lora", "model")):
            other_format = "" if self.format == "kohya" else "set format=kohya, or "
            raise UserError("applies only to a LoRA", key=svd, remedy=f"{other_format}remove {svd}")
        merged = artifact.kind == "lora" and self._is_full_model
        if self.strength != 1.0 and not merged:
            raise UserError(
                "applies only to a LoRA that is merged into a model",
                key="strength",
                remedy="set format=pipeline or single_file, or remove strength",
            )
        if self.alpha == "folded" and not (self.format == "kohya" and artifact.kind in ("lora", "model")):
            raise UserError(
                "folded applies only to a LoRA in kohya format", key="alpha", remedy="set format=kohya, or remove alpha"
            )
        has_header = self.format in ("kohya", "single_file") and artifact.kind in ("lora", "model")
        if self.thumbnail and not has_header:
            raise UserError(
                "applies only to a LoRA or a model in a single file",
                key="thumbnail",
                remedy="set format=kohya or single_file, or remove thumbnail",
            )
        if artifact.kind == "model" and self.format == "kohya" and svd is None:
            raise UserError("required to extract a LoRA from a model", key="rank", remedy="set rank=32 or energy=0.95")

    def write(self, artifact: Artifact, source: Pretrained, folder: Path, previews: Sequence[Path] = ()) -> list[Path]:
        """Export ``artifact`` into ``folder``, which is created, and return the written files and folders.

        Args:
            artifact: the artifact to export.
            source: the backbone that it was trained on.
            folder: the output folder.
            previews: image files; with ``thumbnail``, the first is put into the header.
        """
        header = {"modelspec.thumbnail": thumbnail(previews[0])} if self.thumbnail and previews else {}
        written: list[Path] = []
        if artifact.kind == "lora":
            written = self._lora(artifact, source, folder, header)
        elif artifact.kind == "model":
            written = self._model(artifact, source, folder, header)
        elif artifact.kind == "controlnet":
            written = self._controlnet(artifact, source, folder)
        return [*written, *self._embeddings(artifact, source, folder)]

    def write_card(self, artifact: Artifact, card: Path, folder: Path) -> None:
        """Write the run's ``card``, adapted to this export, next to the files of :meth:`write` in ``folder``."""
        lora = artifact.kind == "lora"
        layout = {"pipeline": "a pipeline folder", "single_file": "a single file", "kohya": "kohya format"}.get(
            self.format, "diffusers format"
        )
        if lora and self._is_full_model:
            name = self.merged(artifact.name)
            description = (
                f"A full Stable Diffusion model in {layout}, {self.dtype}: a LoRA merged into its base model"
                f" at strength {self.strength:g}"
            )
        else:
            model = "LoRA extracted from a fine-tuned model" if self.format == "kohya" else "model"
            kinds = {
                "lora": "LoRA",
                "embeddings": "new token's embedding",
                "controlnet": "ControlNet",
                "model": model,
            }
            name, kind = artifact.name, kinds[artifact.kind]
            reduction = f", reduced to {self._reduction}" if lora and self._reduction else ""
            description = f"The {kind} in {layout}, {self.dtype}{reduction}"
        merged = self.format if lora and self._is_full_model else None
        write_export_card(folder, card, artifact, name, description, merged)

    @property
    def _reduction(self) -> str:
        return f"rank {self.rank}" if self.rank else f"{self.energy:.0%} of its energy" if self.energy else ""

    # --- embeddings of new tokens

    def _embeddings(self, artifact: Artifact, source: Pretrained, folder: Path) -> list[Path]:
        if not artifact.words:
            return []
        # The hash is of the weights with which the embeddings were trained.
        trained_with = source.of_trained_pipeline(artifact.path) if artifact.kind == "model" else source
        metadata = {"sdtune_backbone_hash": trained_with.hash()}
        formats = ("diffusers", "kohya") if self._is_full_model else (self.format,)
        return embeddings.write(folder, artifact.words, "", metadata, formats, DTYPES[self.dtype])

    @property
    def _is_full_model(self) -> bool:
        return self.format in ("pipeline", "single_file")

    # --- LoRA

    def _lora(self, artifact: Artifact, source: Pretrained, folder: Path, header: dict[str, str]) -> list[Path]:
        # This warns if the LoRA was trained on another backbone.
        check_adapter(str(artifact.path), source.hash(), "artifact")
        backbone = source.load()
        [loaded] = [a for a in AdapterFile(str(artifact.path)).load(backbone, source) if isinstance(a, LoadedLoRA)]
        if self._is_full_model:
            with loaded.applied(backbone, self.strength):
                artifact_metadata = {"sdtune_lora": artifact.name, "sdtune_strength": f"{self.strength:g}"}
                artifact_metadata |= {"sdtune_base_hash": source.hash(), **header}
                return self._full_model(self.merged(artifact.name), backbone, source, folder, artifact_metadata)
        weights, metadata = loaded.weights, read_metadata(artifact.path)
        if self.rank is not None or self.energy is not None:
            weights, shares = factors.reduce(weights, self.rank, self.energy)
            _log_energy(weights, shares)
        return self._lora_file(artifact.name, weights, backbone, source, metadata | header, folder)

    def _lora_file(
        self,
        name: str,
        weights: LoRAWeights,
        backbone: Backbone,
        source: Pretrained,
        metadata: dict[str, str],
        folder: Path,
    ) -> list[Path]:
        dtype = DTYPES[self.dtype]
        artifact_metadata = {"sdtune_backbone_hash": source.hash(), **metadata}
        if self.format == "diffusers":
            # The ss_ and sshs_ fields describe the kohya file, including its hash.
            artifact_metadata = {
                key: value for key, value in artifact_metadata.items() if not key.startswith(("ss_", "sshs_"))
            }
            target = folder / diffusers_lora.FILE_NAME
            diffusers_lora.write(target, weights, artifact_metadata, dtype)
            return [target]
        if self.alpha == "folded":
            weights = weights.folded()
        family = backbone.facts.family
        spec = kohya_lora.ModelSpec(
            title=name,
            resolution=_side(metadata, backbone.facts.side),
            prediction_type=model_spec_prediction(backbone.path.prediction_type),
            steps=_number(metadata.get("ss_steps")),
            seed=_number(metadata.get("ss_seed")),
            trigger=metadata.get("modelspec.trigger_phrase"),
            model=family.lora_names(backbone.path.prediction_type),
        )
        target = folder / f"{name}.safetensors"
        table = family.kohya_table(weights.pairs, dict(backbone.denoiser.config))
        kohya_lora.write(target, weights, spec, artifact_metadata, table, dtype)
        return [target]

    # --- full models

    def _model(self, artifact: Artifact, source: Pretrained, folder: Path, header: dict[str, str]) -> list[Path]:
        tuned = source.of_trained_pipeline(artifact.path)
        if self.format != "kohya":
            return self._full_model(artifact.name, tuned.load(), tuned, folder, header)
        backbone, changed = source.load(), tuned.load()
        if backbone.facts.family != changed.facts.family:
            raise UserError(
                f"{artifact.path} was not trained from {source.path}: their model families differ",
                key="backbone.path",
                remedy=_SET_BASE_MODEL,
            )
        before, after = _weights(backbone), _weights(changed)
        mismatch = next((m for m, weight in after.items() if m not in before or before[m].shape != weight.shape), None)
        if mismatch is not None:
            raise UserError(
                f"{artifact.path} was not trained from {source.path}: {mismatch} differs",
                key="backbone.path",
                remedy=_SET_BASE_MODEL,
            )
        weights, shares = factors.extract(after, before, self.rank, self.energy)
        if not weights.pairs:
            raise UserError(
                f"nothing to extract: in all layers that a LoRA can change, {artifact.path} has the weights"
                f" of {source.path}",
                key="artifact",
                remedy=_SET_BASE_MODEL,
            )
        _log_energy(weights, shares)
        _log_unrepresented_change(backbone, changed, set(after))
        return self._lora_file(artifact.name, weights, backbone, source, header, folder)

    def merged(self, name: str) -> str:
        """Name of the full model with the LoRA ``name`` merged in (programs store it in another folder than LoRAs)."""
        return f"{name}-merged" + (f"-{self.strength:g}" if self.strength != 1.0 else "")

    def _full_model(
        self, name: str, backbone: Backbone, source: Pretrained, folder: Path, artifact_metadata: dict[str, str]
    ) -> list[Path]:
        if self.format == "single_file":
            target = folder / f"{name}.safetensors"
            write_single_file(backbone, source, target, DTYPES[self.dtype], artifact_metadata)
        else:
            target = folder / name
            write_pipeline(backbone, source, target, DTYPES[self.dtype])
        return [target]

    # --- ControlNets

    def _controlnet(self, artifact: Artifact, source: Pretrained, folder: Path) -> list[Path]:
        dtype = DTYPES[self.dtype]
        if artifact.path.is_file():
            backbone = source.load()
            controlnet = backbone.controlnets.load(artifact.path, "artifact", backbone)
            config, tensors = dict(controlnet.config), controlnet.state_dict()
        else:
            config = read_json(artifact.path / "config.json")
            tensors, _ = read_safetensors(artifact.path / CONTROLNET_WEIGHTS)
        has_denoiser = (artifact.path / source.denoiser_folder).is_dir()
        if self.format == "single_file":
            names = controlnets_of(source.facts.family).names_in_file(tensors, config)
            target = folder / f"{artifact.name}.safetensors"
            renamed = {names[key]: value for key, value in cast_tensors(tensors, dtype).items()}
            write_safetensors(target, renamed, {"modelspec.title": artifact.name})
            return [target, *self._model_of_trained_denoiser(artifact, source, folder)] if has_denoiser else [target]
        target = folder / artifact.name
        with replacing(target) as partial:
            if artifact.path.is_file():
                for_safetensors = {key: value for key, value in config.items() if not key.startswith("_name")}
                write_json(partial / "config.json", for_safetensors)
                write_safetensors(partial / CONTROLNET_WEIGHTS, cast_tensors(tensors, dtype), {"format": "pt"})
            else:
                _copy_controlnet(artifact.path, partial, ["", source.denoiser_folder] if has_denoiser else [""], dtype)
        return [target]

    def _model_of_trained_denoiser(self, artifact: Artifact, source: Pretrained, folder: Path) -> list[Path]:
        """Write the full model with the denoiser trained together with the ControlNet; programs load both files."""
        backbone = source.load()
        backbone.denoiser.load_state_dict(
            read_safetensors(artifact.path / source.denoiser_folder / CONTROLNET_WEIGHTS)[0]
        )
        target = folder / f"{artifact.name}-model.safetensors"
        write_single_file(backbone, source, target, DTYPES[self.dtype], {})
        return [target]


def _copy_controlnet(source: Path, target: Path, parts: Sequence[str], dtype: torch.dtype) -> None:
    """Copy the subfolders ``parts`` of a ControlNet folder, with tensors in ``dtype``."""
    for part in parts:
        content, _ = read_safetensors(source / part / CONTROLNET_WEIGHTS)
        write_json(target / part / "config.json", read_json(source / part / "config.json"))
        write_safetensors(target / part / CONTROLNET_WEIGHTS, cast_tensors(content, dtype), {"format": "pt"})
    if (facts := source / "sdtune.json").is_file():
        write_json(target / "sdtune.json", read_json(facts))


def _number(text: str | None) -> int:
    return int(text) if text is not None and text.isdigit() else 0


def _side(metadata: dict[str, str], default: int) -> int:
    width = metadata.get("modelspec.resolution", "").partition("x")[0]
    return int(width) if width.isdigit() else default


def _weights(backbone: Backbone) -> dict[str, Tensor]:
    """Weights of the modules that a LoRA file may contain: denoiser blocks and text encoders, by path in the file."""
    return {
        module_path(backbone, component, name): layer.weight.data
        for component, name, layer in layers(backbone)
        if (component != "denoiser" or name.startswith(backbone.facts.family.blocks)) and "text_projection" not in name
    }


def _log_unrepresented_change(before: Backbone, after: Backbone, modules: set[str]) -> None:
    """Log the share of the squared weight change outside of ``modules``: biases, norms, embeddings, the VAE."""
    inside = outside = 0.0
    changed = {"denoiser": after.denoiser, "vae": after.vae, **after.encoders}
    for component, model in {"denoiser": before.denoiser, "vae": before.vae, **before.encoders}.items():
        originals = dict(model.named_parameters())
        for name, value in changed[component].named_parameters():
            change = float((value.data.float() - originals[name].data.float()).square().sum())
            if module_path(before, component, name).removesuffix(".weight") in modules and name.endswith(".weight"):
                inside += change
            else:
                outside += change
    if outside > 0:
        log.info(
            "LoRA: %.2f%% of the squared weight change is in parameters that a LoRA cannot contain",
            100 * outside / (inside + outside),
        )


def _log_energy(weights: LoRAWeights, shares: dict[str, float]) -> None:
    ranks = sorted(weights.rank(module) for module in weights.pairs)
    mean = sum(shares.values()) / len(shares)
    log.info(
        "LoRA: %d modules, ranks %d to %d (median %d); energy kept per module: %.1f%% on average, %.1f%% at least",
        len(ranks),
        ranks[0],
        ranks[-1],
        ranks[len(ranks) // 2],
        100 * mean,
        100 * min(shares.values()),
    )
