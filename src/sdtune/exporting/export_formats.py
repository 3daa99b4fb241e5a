"""Export formats: diffusers, kohya, pipeline folder, single file; merged, extracted, reduced."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, get_args

import torch
from annotated_types import Ge, Interval
from torch import Tensor

from sdtune.backbone.backbone import Backbone
from sdtune.backbone.controlnet_files import WEIGHTS, embedding_widths, load_controlnet
from sdtune.backbone.layers import BLOCKS, layers
from sdtune.backbone.pretrained import Pretrained
from sdtune.errors import UserError
from sdtune.exporting.artifact import Artifact, Kind
from sdtune.exporting.card import write_export_card
from sdtune.exporting.models import cast_tensors, write_pipeline, write_single_file
from sdtune.files import replacing, write_json
from sdtune.formats import (
    LoRAWeights,
    canonical,
    diffusers_lora,
    embeddings,
    factors,
    kohya_lora,
    write_safetensors,
)
from sdtune.formats.files import read_metadata, read_safetensors
from sdtune.formats.original.names import controlnet_names
from sdtune.loaders import lora as adapters

log = logging.getLogger("sdtune")

Format = Literal["diffusers", "kohya", "pipeline", "single_file"]
Dtype = Literal["fp16", "bf16", "fp32"]

DTYPES: dict[Dtype, torch.dtype] = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}

FORMATS: dict[Kind, tuple[Format, ...]] = {
    "lora": get_args(Format),
    "words": ("diffusers", "kohya"),
    "controlnet": ("diffusers", "single_file"),
    "model": get_args(Format),
}
"""What each kind can be written as."""


@dataclass(frozen=True)
class Export:
    """How an artifact is written.

    Args:
        format: ``diffusers``: as diffusers loads it; ``kohya``: a LoRA for A1111, ComfyUI and kohya's tools, a word for
            A1111, and of a whole model the LoRA that is its difference from the backbone; ``pipeline`` and
            ``single_file``: a whole model, a LoRA merged into it.
        dtype: of its tensors.
        strength: at which a LoRA is merged.
        rank: of a LoRA that is reduced, or extracted from a model.
        energy: the share of the squared singular values that such a LoRA keeps.
        alpha: of kohya's form: as trained, or folded into the matrices, so that it equals the rank.
    """

    format: Format
    dtype: Dtype = "fp16"
    strength: float = 1.0
    rank: Annotated[int, Ge(1)] | None = None
    energy: Annotated[float, Interval(gt=0, le=1)] | None = None
    alpha: Literal["kept", "folded"] = "kept"

    def check(self, artifact: Artifact) -> None:
        """UserError for a form that ``artifact`` has not."""
        known = FORMATS[artifact.kind]
        if self.format not in known:
            raise UserError(
                f"a {artifact.kind} has no form {self.format}", key="format", remedy=f"give format={' or '.join(known)}"
            )
        lora = self.format == "kohya" or (self.format == "diffusers" and artifact.kind == "lora")
        svd = next((key for key in ("rank", "energy") if getattr(self, key) is not None), None)
        if svd is not None and not (lora and artifact.kind in ("lora", "model")):
            raise UserError("only a LoRA has one", key=svd, remedy="give format=kohya, or leave it out")
        merged = artifact.kind == "lora" and self._whole
        if self.strength != 1.0 and not merged:
            raise UserError(
                "only a LoRA that is merged has one",
                key="strength",
                remedy="give format=pipeline or single_file, or leave it out",
            )
        if self.alpha == "folded" and not (self.format == "kohya" and artifact.kind in ("lora", "model")):
            raise UserError("only kohya's form has one", key="alpha", remedy="give format=kohya, or leave it out")
        if artifact.kind == "model" and self.format == "kohya" and svd is None:
            raise UserError("a LoRA is to be extracted from a model", key="rank", remedy="give rank=32, or energy=0.95")

    def write(self, artifact: Artifact, source: Pretrained, folder: Path) -> list[Path]:
        """Write it into ``folder``; the files and folders made.

        Args:
            artifact: what is written.
            source: the backbone that it was trained on.
            folder: is made.
        """
        written = {
            "lora": self._lora,
            "model": self._model,
            "controlnet": self._controlnet,
            "words": lambda *_: [],
        }[artifact.kind](artifact, source, folder)
        return [*written, *self._words(artifact, source, folder)]

    def write_card(self, artifact: Artifact, card: Path, folder: Path) -> None:
        """Beside what :meth:`write` has written into ``folder``: the run's ``card``, saying what form this is."""
        lora = artifact.kind == "lora"
        form = {"pipeline": "a pipeline folder", "single_file": "a single file", "kohya": "kohya's form"}.get(
            self.format, "diffusers' form"
        )
        if lora and self._whole:
            name = self.merged(artifact.name)
            what = f"A whole Stable Diffusion, {form} in {self.dtype}: a LoRA merged into its base at {self.strength:g}"
        else:
            model = "LoRA extracted from a fine-tuned model" if self.format == "kohya" else "model"
            kinds = {"lora": "LoRA", "words": "learned word", "controlnet": "ControlNet", "model": model}
            name, kind = artifact.name, kinds[artifact.kind]
            cut = f", reduced to {self._kept}" if lora and self._kept else ""
            what = f"The {kind} in {form}, {self.dtype}{cut}"
        write_export_card(folder, card, artifact, name, what, self._whole and lora)

    @property
    def _kept(self) -> str:
        return f"rank {self.rank}" if self.rank else f"{self.energy:.0%} of its energy" if self.energy else ""

    # --- words

    def _words(self, artifact: Artifact, source: Pretrained, folder: Path) -> list[Path]:
        if not artifact.words:
            return []
        # Words belong to the weights that they were learned beside.
        beside = source.trained(artifact.path) if artifact.kind == "model" else source
        about = {"sdtune_backbone_hash": beside.hash()}
        forms = ("diffusers", "kohya") if self._whole else (self.format,)
        return embeddings.write(folder, artifact.words, "", about, forms, DTYPES[self.dtype])

    @property
    def _whole(self) -> bool:
        return self.format in ("pipeline", "single_file")

    # --- LoRA

    def _lora(self, artifact: Artifact, source: Pretrained, folder: Path) -> list[Path]:
        adapters.check_file(str(artifact.path), source.hash(), "artifact")  # which warns of another backbone
        backbone = source.load()
        file = adapters.AdapterFile(str(artifact.path))
        [loaded] = adapters.load_adapters(backbone, [file])
        if self._whole:
            with adapters.adapters_applied(backbone, [loaded], [self.strength]):
                about = {"sdtune_lora": artifact.name, "sdtune_strength": f"{self.strength:g}"}
                about["sdtune_base_hash"] = source.hash()
                return self._whole_model(self.merged(artifact.name), backbone, source, folder, about)
        weights, metadata = loaded.weights, read_metadata(artifact.path)
        if self.rank is not None or self.energy is not None:
            weights, shares = factors.reduce(weights, self.rank, self.energy)
            _say(weights, shares)
        return self._lora_file(artifact.name, weights, backbone, source, metadata, folder)

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
        about = {"sdtune_backbone_hash": source.hash(), **metadata}
        if self.format == "diffusers":
            # kohya's fields speak of kohya's file, its hash among them.
            about = {key: value for key, value in about.items() if not key.startswith(("ss_", "sshs_"))}
            target = folder / diffusers_lora.FILE_NAME
            diffusers_lora.write(target, weights, about, dtype)
            return [target]
        if self.alpha == "folded":
            weights = weights.folded()
        velocity = backbone.prediction_type == "v_prediction"
        spec = kohya_lora.ModelSpec(
            title=name,
            resolution=_side(metadata, backbone.facts.side),
            prediction_type="v" if velocity else "epsilon",
            steps=_number(metadata.get("ss_steps")),
            seed=_number(metadata.get("ss_seed")),
            trigger=metadata.get("modelspec.trigger_phrase"),
            architecture=kohya_lora.architecture(backbone.facts.family, velocity),
        )
        target = folder / f"{name}.safetensors"
        kohya_lora.write(target, weights, spec, about, dict(backbone.unet.config), dtype)
        return [target]

    # --- whole models

    def _model(self, artifact: Artifact, source: Pretrained, folder: Path) -> list[Path]:
        tuned = source.trained(artifact.path)
        if self.format != "kohya":
            return self._whole_model(artifact.name, tuned.load(), tuned, folder, {})
        backbone, changed = source.load(), tuned.load()
        if backbone.facts.family != changed.facts.family:
            raise UserError(f"{source.path} is not what {artifact.path} was trained from", key="backbone.path")
        before, after = _weights(backbone), _weights(changed)
        odd = next((m for m, weight in after.items() if m not in before or before[m].shape != weight.shape), None)
        if odd is not None:
            raise UserError(
                f"{source.path} is not what {artifact.path} was trained from: {odd} differs", key="backbone.path"
            )
        weights, shares = factors.extract(after, before, self.rank, self.energy)
        if not weights.pairs:
            raise UserError(
                f"{artifact.path} has the weights of {source.path} in all that a LoRA can change;"
                " nothing is to be extracted",
                key="artifact",
            )
        _say(weights, shares)
        _say_rest(backbone, changed, set(after))
        return self._lora_file(artifact.name, weights, backbone, source, {}, folder)

    def merged(self, name: str) -> str:
        """What a whole model is called that the LoRA ``name`` is merged into: it goes to another folder of programs."""
        return f"{name}-merged" + (f"-{self.strength:g}" if self.strength != 1.0 else "")

    def _whole_model(
        self, name: str, backbone: Backbone, source: Pretrained, folder: Path, about: dict[str, str]
    ) -> list[Path]:
        if self.format == "single_file":
            target = folder / f"{name}.safetensors"
            write_single_file(backbone, source, target, DTYPES[self.dtype], about)
        else:
            target = folder / name
            write_pipeline(backbone, source, target, DTYPES[self.dtype])
        return [target]

    # --- ControlNets

    def _controlnet(self, artifact: Artifact, source: Pretrained, folder: Path) -> list[Path]:
        dtype = DTYPES[self.dtype]
        if artifact.path.is_file():
            backbone = source.load()
            net = load_controlnet(artifact.path, "artifact", backbone.unet, embedding_widths(backbone.facts.factor))
            config, tensors = dict(net.config), net.state_dict()
        else:
            config = json.loads((artifact.path / "config.json").read_text())
            tensors, _ = read_safetensors(artifact.path / WEIGHTS)
        opened = artifact.path / "unet"
        if self.format == "single_file":
            names = {key: f"control_model.{theirs}" for key, theirs in controlnet_names(tensors, config).items()}
            if config.get("addition_embed_type"):
                # SDXL's nets came after the authors' layout, and programs look for diffusers' names in their files.
                names = {key: key for key in tensors}
            target = folder / f"{artifact.name}.safetensors"
            made = {names[key]: value for key, value in cast_tensors(tensors, dtype).items()}
            write_safetensors(target, made, {"modelspec.title": artifact.name})
            return [target, *self._opened(artifact, source, folder)] if opened.is_dir() else [target]
        target = folder / artifact.name
        with replacing(target) as place:
            if artifact.path.is_file():
                own = {key: value for key, value in config.items() if not key.startswith("_name")}
                write_json(place / "config.json", own)
                write_safetensors(place / WEIGHTS, cast_tensors(tensors, dtype), {"format": "pt"})
            else:
                _copy_controlnet(artifact.path, place, dtype)
        return [target]

    def _opened(self, artifact: Artifact, source: Pretrained, folder: Path) -> list[Path]:
        """The whole model with the UNet that was trained along with a net: programs load the two beside each other."""
        backbone = source.load()
        backbone.unet.load_state_dict(read_safetensors(artifact.path / "unet" / WEIGHTS)[0])
        target = folder / f"{artifact.name}-model.safetensors"
        write_single_file(backbone, source, target, DTYPES[self.dtype], {})
        return [target]


def _copy_controlnet(source: Path, target: Path, dtype: torch.dtype) -> None:
    """A ControlNet's folder, with the UNet that was trained along where there is one, its tensors in ``dtype``."""
    for part in ("", "unet") if (source / "unet").is_dir() else ("",):
        content, _ = read_safetensors(source / part / WEIGHTS)
        write_json(target / part / "config.json", json.loads((source / part / "config.json").read_text()))
        write_safetensors(target / part / WEIGHTS, cast_tensors(content, dtype), {"format": "pt"})
    if (facts := source / "sdtune.json").is_file():
        write_json(target / "sdtune.json", json.loads(facts.read_text()))


def _number(said: str | None) -> int:
    return int(said) if said is not None and said.isdigit() else 0


def _side(metadata: dict[str, str], otherwise: int) -> int:
    said = metadata.get("modelspec.resolution", "").partition("x")[0]
    return int(said) if said.isdigit() else otherwise


def _weights(backbone: Backbone) -> dict[str, Tensor]:
    """The weight of each module that a LoRA file may name: of residual and transformer blocks, and text encoders'."""
    return {
        canonical(f"{component}.{name}"): layer.weight.data
        for component, name, layer in layers(backbone)
        if (component != "unet" or name.startswith(BLOCKS)) and "text_projection" not in name
    }


def _say_rest(before: Backbone, after: Backbone, held: set[str]) -> None:
    """How much of the change a LoRA has no place for: biases, norms, embeddings, the VAE."""
    inside = outside = 0.0
    for component in ("unet", "vae", *before.encoders):
        own = dict(getattr(before, component).named_parameters())
        for name, value in getattr(after, component).named_parameters():
            change = float((value.data.float() - own[name].data.float()).square().sum())
            if canonical(f"{component}.{name}").removesuffix(".weight") in held and name.endswith(".weight"):
                inside += change
            else:
                outside += change
    if outside > 0:
        log.info(
            "LoRA: %.2f%% of the squared change is in what it has no place for", 100 * outside / (inside + outside)
        )


def _say(weights: LoRAWeights, shares: dict[str, float]) -> None:
    ranks = sorted(weights.rank(module) for module in weights.pairs)
    mean = sum(shares.values()) / len(shares)
    log.info(
        "LoRA: %d modules, ranks %d to %d (median %d); of each module's squared change it keeps %.1f%% on average,"
        " %.1f%% at least",
        len(ranks),
        ranks[0],
        ranks[-1],
        ranks[len(ranks) // 2],
        100 * mean,
        100 * min(shares.values()),
    )
