"""LoRA: low-rank pairs beside frozen weights (Hu et al. 2021)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Unpack

import torch
from annotated_types import Ge, Gt, Interval
from peft import LoraConfig, inject_adapter_in_model
from pydantic import ConfigDict
from torch import Tensor, nn

from sdtune import streams
from sdtune.backbone.layers import BLOCKS, layers, named_modules
from sdtune.data.datamodule import ImageDataModule
from sdtune.errors import UserError
from sdtune.formats import kohya_lora, read_lora
from sdtune.formats.diffusers_lora import FILE_NAME
from sdtune.formats.diffusers_lora import write as write_diffusers
from sdtune.formats.lora import LoRAWeights, canonical
from sdtune.loaders.lora import check_file
from sdtune.methods.base import Adapter
from sdtune.peft_compat import register_layers
from sdtune.randomness import generator
from sdtune.training.arguments import Common
from sdtune.training.lora_layer import Site

Target = Literal["cross_attention", "self_attention", "feed_forward", "convolutions", "text_encoder"]
AlphaPolicy = Literal["rank", "constant", "rslora"]


@dataclass(frozen=True)
class Block:
    """What the modules below one part of the model have instead of the run's own.

    Args:
        rank: of their pairs.
        alpha: of their pairs; by the policy from ``rank`` if None.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    rank: Annotated[int, Ge(1)]
    alpha: Annotated[float, Gt(0)] | None = None


Projection = Literal["q", "k", "v", "out"]

_UNET_PROJECTIONS: dict[Projection, str] = {"q": "to_q", "k": "to_k", "v": "to_v", "out": "to_out.0"}
_TEXT_PROJECTIONS: dict[Projection, str] = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "out": "out_proj"}
_CONVOLUTIONS = ("conv1", "conv2", "conv_shortcut", "conv", "proj_in", "proj_out")


class LoRA(Adapter):
    """W' = W + (alpha / rank) B A (Hu et al. 2021, eq. 3), through peft.

    Args:
        rank: columns of A and rows of B.
        alpha: of W' = W + (alpha / rank) B A; given where the policy does not make it follow from the rank.
        alpha_policy: ``rank``: alpha = rank, so that sweeping the rank does not also sweep the step size;
            ``constant``: ``alpha`` at every rank; ``rslora``: W' = W + (alpha / sqrt(rank)) B A (Kalajdzievski 2023,
            eq. 4).
        blocks: by the start of a module's path, such as ``unet.mid_block`` or ``text_encoder``, the rank and alpha of
            what lies below it; the longest that fits counts.
        targets: what gets pairs. ``convolutions`` are those of the residual blocks, the samplers and the transformers'
            projections in and out; ``text_encoder`` its attention (its MLP too, with ``feed_forward``).
        projections: which of an attention's projections.
        dropout: on the adapter's branch alone.
        text_encoder_lr: learning rate of the text encoder's pairs; the optimizer's if None.
        weights: a LoRA to begin from, in diffusers' form or kohya's, sdtune's or another's; of the same ranks.
    """

    artifact_kind = "lora"
    reads_denoiser_only = True

    def __init__(
        self,
        *,
        rank: Annotated[int, Ge(1)] = 8,
        alpha: Annotated[float, Gt(0)] | None = None,
        alpha_policy: AlphaPolicy = "rank",
        blocks: Mapping[str, Block] | None = None,
        targets: Sequence[Target] = ("cross_attention", "self_attention"),
        projections: Sequence[Projection] = ("q", "k", "v", "out"),
        dropout: Annotated[float, Interval(ge=0, lt=1)] = 0.0,
        text_encoder_lr: Annotated[float, Gt(0)] | None = None,
        weights: str | None = None,
        **common: Unpack[Common],
    ) -> None:
        super().__init__(**common)
        if not targets:
            raise UserError(
                "name at least one of cross_attention, self_attention, feed_forward, ...", key="method.targets"
            )
        if alpha_policy == "rank" and alpha is not None:
            raise UserError(
                f"{alpha} is given, but alpha is the rank",
                key="method.alpha",
                remedy="add method.alpha_policy=constant",
            )
        if alpha_policy != "rank" and alpha is None:
            raise UserError(
                f"method.alpha is missing: alpha_policy={alpha_policy} needs one", remedy="give method.alpha=16"
            )
        self.rank, self.alpha, self.alpha_policy = rank, alpha, alpha_policy
        # From a config they come as plain mappings.
        self.blocks = {k: Block(**b) if isinstance(b, Mapping) else b for k, b in (blocks or {}).items()}
        for key, block in self.blocks.items():
            if alpha_policy == "rank" and block.alpha is not None:
                raise UserError(
                    "give method.alpha_policy=constant and method.alpha too", key=f"method.blocks.{key}.alpha"
                )
        self.text_encoder_lr, self.weights_file = text_encoder_lr, weights
        if weights is not None and not Path(weights).expanduser().exists():
            raise UserError(f"{weights} does not exist", key="method.weights", remedy="name a LoRA's file")
        self.targets, self.projections, self.dropout = tuple(targets), tuple(projections), dropout

    def check_data(self, data: ImageDataModule) -> None:
        if self.weights_file is not None:
            check_file(self.weights_file, self.source.hash(), "method.weights")

    def inject(self) -> None:
        self._pair("unet", self.backbone.unet, self._unet_sites())
        for component, encoder in self.backbone.encoders.items() if "text_encoder" in self.targets else ():
            self._pair(component, encoder, self._text_sites(component))
        paths = [canonical(f"{component}.{name}") for component, name, _ in self._paired()] if self.blocks else []
        for key in self.blocks:
            if not any(_below(path, canonical(key)) for path in paths):
                raise UserError(
                    f"{key} is the start of no module that gets pairs, such as {paths[0]}", key="method.blocks"
                )
        if self.weights_file is not None:
            self._begin_from(Path(self.weights_file).expanduser())

    def _begin_from(self, file: Path) -> None:
        """Take the pairs in ``file``; what it has none for begins as ever."""
        xl = dict(self.backbone.unet.config) if self.backbone.facts.family == "sdxl" else None
        sites = {canonical(f"{component}.{name}"): module for component, name, module in self._paired()}
        try:
            theirs, _ = read_lora(file, sites, xl)
        except UserError as error:
            raise UserError(
                f"{error}; method.targets and method.projections say what gets pairs", key="method.weights"
            ) from error
        for path, (down, up) in theirs.pairs.items():
            rank, alpha = self._rank_and_alpha(path)
            if theirs.rank(path) != rank:
                raise UserError(
                    f"{path} has rank {theirs.rank(path)} in {file.name} and {rank} in this run",
                    key="method.weights",
                    remedy=f"give method.rank={theirs.rank(path)}",
                )
            # The file's scale goes into B, so that at the run's own the change is the same.
            own = alpha / math.sqrt(rank) if self.alpha_policy == "rslora" else alpha / rank
            scale = theirs.alphas[path] / rank / own
            parts = {"lora_A": down, "lora_B": up * scale}
            for part, value in parts.items():
                weight: Tensor = getattr(sites[path], part)["default"].weight
                if weight.shape != value.shape:
                    raise UserError(f"{path} is for another backbone than this one", key="method.weights")
                weight.data.copy_(value)

    def _paired(self) -> Iterator[tuple[str, str, nn.Module]]:
        """Component, name in it, and module of each site."""
        module: Any
        for component, name, module in named_modules(self.backbone):
            if hasattr(module, "lora_A") and "default" in module.lora_A:
                yield component, name, module

    def _rank_and_alpha(self, path: str) -> tuple[int, float]:
        """Of the module at ``path``, canonical and with its component."""
        fits = [key for key in self.blocks if _below(path, canonical(key))]
        block = self.blocks[max(fits, key=len)] if fits else Block(self.rank)
        if self.alpha is None:
            return block.rank, float(block.rank)
        return block.rank, float(block.alpha if block.alpha is not None else self.alpha)

    def component_rates(self) -> Mapping[str, float | None]:
        return {"text_encoder": self.text_encoder_lr}

    def _unet_sites(self) -> list[str]:
        wanted: list[str] = []
        attention = [_UNET_PROJECTIONS[p] for p in self.projections]
        for component, name, _ in layers(self.backbone):
            if component != "unet" or not name.startswith(BLOCKS):
                continue
            if ".attn1." in name or ".attn2." in name:
                kind = "self_attention" if ".attn1." in name else "cross_attention"
                site = kind in self.targets and name.endswith(tuple(attention))
            elif ".ff." in name:
                site = "feed_forward" in self.targets
            else:
                site = "convolutions" in self.targets and name.rpartition(".")[2] in _CONVOLUTIONS
            if site:
                wanted.append(name)
        return wanted

    def _text_sites(self, component: str) -> list[str]:
        endings = [_TEXT_PROJECTIONS[p] for p in self.projections]
        endings += ["fc1", "fc2"] if "feed_forward" in self.targets else []
        behind = self.backbone.unused(component)
        return [
            n
            for n, m in self.backbone.encoders[component].named_modules()
            if isinstance(m, nn.Linear) and n.endswith(tuple(endings)) and not n.startswith(behind)
        ]

    def _pair(self, component: str, model: nn.Module, sites: list[str]) -> None:
        if not sites:
            return
        # peft matches by suffix, and "conv1" is a suffix of no other site; full names match exactly one module each.
        own = {name: self._rank_and_alpha(canonical(f"{component}.{name}")) for name in sites}
        config = LoraConfig(
            r=self.rank,
            target_modules=sites,
            rank_pattern={name: rank for name, (rank, _) in own.items()},
            alpha_pattern={name: alpha for name, (_, alpha) in own.items()},
            lora_dropout=self.dropout,
            use_rslora=self.alpha_policy == "rslora",
        )
        register_layers(config, {nn.Linear: Site})  # peft's way to layers of one's own
        inject_adapter_in_model(config, model)
        for name, parameter in model.named_parameters():
            if "lora_" in name and parameter.dtype.itemsize == 2:
                parameter.data = parameter.data.float()  # peft gives it the layer's own type
            if "lora_A" in name:
                # Kaiming-uniform with a = sqrt 5 is uniform within 1 / sqrt(fan in); drawn by name, so that the
                # initial value of a pair does not depend on which others there are.
                bound = parameter[0].numel() ** -0.5
                rng = generator(self.seed, f"{streams.INITIAL_VALUES}/{component}.{name}")
                drawn = rng.uniform(-bound, bound, tuple(parameter.shape)).astype("float32")
                parameter.data.copy_(torch.from_numpy(drawn))

    def weights(self) -> LoRAWeights:
        """The pairs as they are now, by diffusers' module path."""
        pairs: dict[str, tuple[Tensor, Tensor]] = {}
        alphas: dict[str, float] = {}
        for component, name, module in self._paired():
            path = canonical(f"{component}.{name}")
            down, up = (getattr(module, part)["default"].weight.detach() for part in ("lora_A", "lora_B"))
            pairs[path] = (down, up)
            rank, alpha = self._rank_and_alpha(path)
            # Files know one scale, alpha / rank.
            alphas[path] = alpha * math.sqrt(rank) if self.alpha_policy == "rslora" else alpha
        return LoRAWeights(pairs, alphas)

    def write_artifact(self, folder: Path, name: str) -> None:
        """``<name>.safetensors`` in kohya's form and ``pytorch_lora_weights.safetensors`` in diffusers'."""
        self.write_snapshot(folder, name)
        write_diffusers(folder / FILE_NAME, self.weights(), self.about(folder / name))

    def artifact_bytes(self) -> int:
        """Of both files."""
        return 2 * super().artifact_bytes()

    def write_snapshot(self, folder: Path, stem: str) -> None:
        """``<stem>.safetensors`` in kohya's form."""
        data = getattr(self.trainer, "datamodule", None)
        prediction: Literal["epsilon", "v"] = "v" if self.backbone.prediction_type == "v_prediction" else "epsilon"
        spec = kohya_lora.ModelSpec(
            title=stem,
            resolution=getattr(data, "resolution", None) or self.backbone.facts.side,
            prediction_type=prediction,
            steps=self.trainer.global_step,
            seed=self.seed,
            trigger=getattr(data, "keep", None) or None,
            architecture=kohya_lora.architecture(self.backbone.facts.family, prediction == "v"),
        )
        about, unet = self.about(folder / stem), dict(self.backbone.unet.config)
        kohya_lora.write(folder / f"{stem}.safetensors", self.weights(), spec, about, unet)


def _below(path: str, start: str) -> bool:
    return path == start or path.startswith(f"{start}.")
