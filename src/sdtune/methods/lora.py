"""LoRA: trainable low-rank pairs in parallel to frozen layers (Hu et al. 2021)."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Unpack, get_args

import torch
from annotated_types import Ge, Gt, Interval
from peft import LoraConfig, inject_adapter_in_model
from pydantic import ConfigDict
from torch import Tensor, nn

from sdtune import streams
from sdtune.backbone.families import LoRAProjection, LoRATarget, model_spec_prediction
from sdtune.backbone.layers import layers, module_path, named_modules
from sdtune.data.datamodule import ImageDataModule
from sdtune.errors import UserError
from sdtune.formats import kohya_lora, read_lora
from sdtune.formats.diffusers_lora import FILE_NAME
from sdtune.formats.diffusers_lora import write as write_diffusers
from sdtune.formats.lora import LoRAWeights, canonical, few
from sdtune.loaders.lora import check_adapter
from sdtune.methods.base import Adapter
from sdtune.peft_compat import register_layers
from sdtune.randomness import generator
from sdtune.training.arguments import Common
from sdtune.training.executor import LocalExecutor
from sdtune.training.lora_layer import FusedLoRALinear, HalfLoRAConv2d, LoRALayers, cast_pairs, drop_cast_pairs

Target = LoRATarget | Literal["text_encoder"]
AlphaPolicy = Literal["rank", "constant", "rslora"]

DEFAULT_RANK = 8

log = logging.getLogger("sdtune")


@dataclass(frozen=True)
class Block:
    """Rank and alpha of the LoRA pairs below one module, in place of the method's.

    Args:
        rank: rank of these pairs.
        alpha: alpha of these pairs. If None: the rank with ``alpha_policy=rank``, ``method.alpha`` with ``constant``
            and ``rslora``, or, if ``alpha_policy`` is None, rank * (alpha / rank in the file).
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    rank: Annotated[int, Ge(1)]
    alpha: Annotated[float, Gt(0)] | None = None


_TEXT_PROJECTIONS: dict[LoRAProjection, str] = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "out": "out_proj"}


def _check_layers(targets: Sequence[Target] | None, projections: Sequence[LoRAProjection] | None) -> None:
    """Raise UserError if no layer gets pairs."""
    attention_only = not {"feed_forward", "convolutions"} & set(targets or ())
    for name, is_empty, options in (
        ("targets", targets is not None and not targets, (*get_args(LoRATarget), "text_encoder")),
        ("projections", projections is not None and not projections and attention_only, get_args(LoRAProjection)),
    ):
        if is_empty:
            remedy = f"set at least one of {', '.join(options)}, or null"
            raise UserError("the list is empty", key=f"method.{name}", remedy=remedy)


class LoRA(Adapter):
    """LoRA through peft: W' = W + (alpha / rank) B A (Hu et al. 2021, eq. 3).

    Args:
        rank: rows of A and columns of B; if None, the ranks in ``weights``, or 8 without ``weights``.
        alpha: alpha in W' = W + (alpha / rank) B A; required for ``alpha_policy`` ``constant`` and ``rslora``.
        alpha_policy: ``rank``: alpha = rank, so that a sweep over the rank does not also change the step size;
            ``constant``: ``alpha`` for every rank; ``rslora``: W' = W + (alpha / sqrt(rank)) B A (Kalajdzievski 2023,
            eq. 4). If None, the alphas in ``weights``, or ``rank`` without ``weights``.
        blocks: rank and alpha for all modules below a module path, such as ``denoiser.mid_block`` or ``text_encoder``;
            if several paths match, the longest is used.
        targets: layers that get pairs. ``convolutions``: those of the residual blocks and samplers, and ``proj_in`` and
            ``proj_out`` of the transformers; ``text_encoder``: its attention (and its MLP, with ``feed_forward``). If
            None, the layers in ``weights`` (if ``projections`` is None too), else the attention of the model.
        projections: attention projections that get pairs; if None, those in ``weights`` (if ``targets`` is None too),
            else all.
        dropout: dropout probability of the input of the LoRA branch.
        text_encoder_lr: learning rate of the text encoder's pairs; the optimizer's if None.
        weights: file with the initial pairs, in diffusers or kohya format, from any program. It also sets the layers,
            ranks and alphas, except those given by other arguments.
    """

    artifact_kind = "lora"
    denoiser_is_read_only = True

    def __init__(
        self,
        *,
        rank: Annotated[int, Ge(1)] | None = None,
        alpha: Annotated[float, Gt(0)] | None = None,
        alpha_policy: AlphaPolicy | None = None,
        blocks: Mapping[str, Block] | None = None,
        targets: Sequence[Target] | None = None,
        projections: Sequence[LoRAProjection] | None = None,
        dropout: Annotated[float, Interval(ge=0, lt=1)] = 0.0,
        text_encoder_lr: Annotated[float, Gt(0)] | None = None,
        weights: str | None = None,
        **common: Unpack[Common],
    ) -> None:
        super().__init__(**common)
        _check_layers(targets, projections)
        if alpha_policy is None and weights is None:
            alpha_policy = "rank"
        if alpha_policy in ("rank", None) and alpha is not None:
            raise UserError(
                f"got {alpha}, but alpha is {'the rank' if alpha_policy else 'that of method.weights'}",
                key="method.alpha",
                remedy="add method.alpha_policy=constant, or remove method.alpha",
            )
        if alpha_policy in ("constant", "rslora") and alpha is None:
            raise UserError(
                f"missing, but method.alpha_policy={alpha_policy} needs it",
                key="method.alpha",
                remedy="set it, for example method.alpha=16",
            )
        self.rank, self.alpha, self.alpha_policy = rank, alpha, alpha_policy
        # A config has plain mappings.
        self.blocks = {k: Block(**b) if isinstance(b, Mapping) else b for k, b in (blocks or {}).items()}
        for key, block in self.blocks.items():
            if alpha_policy == "rank" and block.alpha is not None:
                raise UserError(
                    "with method.alpha_policy=rank alpha is the rank",
                    key=f"method.blocks.{key}.alpha",
                    remedy="set method.alpha_policy=constant and method.alpha",
                )
        if text_encoder_lr is not None and weights is None and "text_encoder" not in (targets or ()):
            names = ",".join([*(targets or self.source.facts.family.default_targets), "text_encoder"])
            raise UserError(
                f"got {text_encoder_lr}, but the text encoder is not trained",
                key="method.text_encoder_lr",
                remedy=f"set 'method.targets=[{names}]', or remove method.text_encoder_lr",
            )
        self.text_encoder_lr, self.weights_file = text_encoder_lr, weights
        if weights is not None and not Path(weights).expanduser().exists():
            raise UserError(f"{weights} does not exist", key="method.weights", remedy="set it to a LoRA file")
        self.targets, self.projections, self.dropout = targets, projections, dropout
        self._ranks_and_alphas_in_file: dict[str, tuple[int, float]] = {}
        self._cast_layers: LoRALayers = ()

    def check_data(self, data: ImageDataModule) -> None:
        family = self.source.facts.family
        lacking = set(self.targets or ()) - {*family.lora_targets, "text_encoder"}
        if lacking:
            raise UserError(
                f"{family.title} has no {sorted(lacking)[0]}",
                key="method.targets",
                remedy=f"set some of {', '.join((*family.lora_targets, 'text_encoder'))}, or null",
            )
        if self.weights_file is not None:
            check_adapter(self.weights_file, self.source.hash(), "method.weights")

    def inject(self) -> None:
        pairs = self._pairs_in_file()
        self._ranks_and_alphas_in_file = {path: (pairs.rank(path), pairs.alphas[path]) for path in pairs.pairs}
        for component, names in self._layers_with_pairs(pairs.pairs.keys()).items():
            self._inject_pairs(component, self._model(component), names)
        modules = {
            module_path(self.backbone, component, name): module for component, name, module in self._lora_layers()
        }
        for key in self.blocks:
            if not any(_is_below(path, self._path_of_block(key)) for path in modules):
                raise UserError(
                    f"no module below {key} gets a LoRA pair",
                    key="method.blocks",
                    remedy="use the start of a module path, such as denoiser.mid_block",
                )
        self._copy_pairs(pairs, modules)

    def _model(self, component: str) -> nn.Module:
        models: dict[str, nn.Module] = {"denoiser": self.backbone.denoiser, **self.backbone.encoders}
        return models[component]

    def on_fit_start(self) -> None:
        super().on_fit_start()
        # With a shared backbone, the pairs of all runs are stacked and cast together, elsewhere.
        casts = self._denoiser_is_half and isinstance(self.executor, LocalExecutor)
        modules = self.backbone.denoiser.modules() if casts else ()
        self._cast_layers = [m for m in modules if isinstance(m, FusedLoRALinear | HalfLoRAConv2d)]

    def _predict(self, inputs: dict[str, Any]) -> Tensor:
        if self._cast_layers:
            cast_pairs(self._cast_layers, next(iter(inputs.values())).dtype)
        output = super()._predict(inputs)
        if not torch.is_grad_enabled():
            drop_cast_pairs(self._cast_layers)
        return output

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        drop_cast_pairs(self._cast_layers)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["sdtune"]["ranks_in_file"] = self._ranks_and_alphas_in_file

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """As the base class.

        Raises:
            UserError: ranks or alphas in ``method.weights`` have changed, which would change the trained pairs.
        """
        if checkpoint["sdtune"]["ranks_in_file"] != self._ranks_and_alphas_in_file:
            raise UserError(
                f"{self.weights_file} has changed since the run started",
                key="method.weights",
                remedy="restore it, or start a new run",
            )
        super().on_load_checkpoint(checkpoint)

    def _pairs_in_file(self) -> LoRAWeights:
        """The pairs in the file ``weights``, except those of layers that the backbone does not use; empty if None."""
        if self.weights_file is None:
            return LoRAWeights({}, {})
        file = Path(self.weights_file).expanduser()
        components = {
            module_path(self.backbone, component, name): (component, name)
            for component, name, _ in layers(self.backbone)
        }
        family = self.backbone.facts.family
        try:
            loaded, _ = read_lora(file, family.kohya_table(components, dict(self.backbone.denoiser.config)))
        except UserError as error:
            raise UserError(str(error), key="method.weights") from error
        if self.alpha_policy is None and (zero := [path for path, alpha in loaded.alphas.items() if not alpha]):
            raise UserError(
                f"{file.name} has alpha 0, with which a pair has no effect: {few(zero, 1)}",
                key="method.weights",
                remedy="set method.alpha_policy=rank",
            )
        unused = {path for path in loaded.pairs if self._is_unused(*components[path])}
        if unused:
            log.warning(
                "WARNING: method.weights: %s: left out the pairs of layers that this backbone does not use (%s)",
                file.name,
                few(unused),
            )
        pairs = {path: pair for path, pair in loaded.pairs.items() if path not in unused}
        return LoRAWeights(pairs, {path: loaded.alphas[path] for path in pairs})

    def _is_unused(self, component: str, name: str) -> bool:
        return f"{name}.".startswith(self.backbone.frozen_prefixes(component))

    def _layers_with_pairs(self, paths_in_file: Set[str]) -> dict[str, list[str]]:
        """Names of the layers that get pairs, by component."""
        if paths_in_file and self.targets is None and self.projections is None:
            names: dict[str, list[str]] = {}
            for component, name, _ in layers(self.backbone):
                if module_path(self.backbone, component, name) in paths_in_file:
                    names.setdefault(component, []).append(name)
            return names
        names = {"denoiser": self._denoiser_layers()}
        if "text_encoder" in (self.targets or ()):
            names |= {component: self._text_encoder_layers(component) for component in self.backbone.trainable_encoders}
        chosen = {module_path(self.backbone, component, name) for component, part in names.items() for name in part}
        if missing := paths_in_file - chosen:
            raise UserError(
                f"pairs of layers that are not in method.targets and method.projections: {few(missing)}",
                key="method.weights",
                remedy="set method.targets=null and method.projections=null to train the layers in the file",
            )
        return names

    def _copy_pairs(self, pairs: LoRAWeights, modules: Mapping[str, nn.Module]) -> None:
        """Copy ``pairs`` to ``modules``; modules without one keep their initial values."""
        for path, (down, up) in pairs.pairs.items():
            rank, alpha = self._rank_and_alpha(path)
            if pairs.rank(path) != rank:
                block = self._block(path)
                key = "method.rank" if block is None else f"method.blocks.{block}.rank"
                raise UserError(
                    f"{path} has rank {pairs.rank(path)} in the file and {rank} in this run",
                    key="method.weights",
                    remedy=f"set {key}={pairs.rank(path)}, or remove {key} to use the ranks in the file",
                )
            # Multiply B by the ratio of the scales, so that B A with this run's scale equals the file's update.
            run_scale = alpha / math.sqrt(rank) if self.alpha_policy == "rslora" else alpha / rank
            matrices = {"lora_A": down, "lora_B": up * (pairs.alphas[path] / rank / run_scale)}
            for name, value in matrices.items():
                weight: Tensor = getattr(modules[path], name)["default"].weight
                if weight.shape != value.shape:
                    raise UserError(
                        f"{name} of {path} has shape {[*value.shape]}, this backbone needs {[*weight.shape]}",
                        key="method.weights",
                        remedy="use a LoRA that was trained on this backbone",
                    )
                weight.data.copy_(value)

    def _lora_layers(self) -> Iterator[tuple[str, str, nn.Module]]:
        """Component, name in the component, and module of each layer with a pair."""
        module: Any
        for component, name, module in named_modules(self.backbone):
            if hasattr(module, "lora_A") and "default" in module.lora_A:
                yield component, name, module

    def _rank_and_alpha(self, path: str) -> tuple[int, float]:
        """Rank and alpha of the module at the canonical ``path``, which starts with its component."""
        name = self._block(path)
        block = None if name is None else self.blocks[name]
        # A layer that is not in the file gets the file's largest rank.
        file_rank, file_alpha = self._ranks_and_alphas_in_file.get(path) or max(
            self._ranks_and_alphas_in_file.values(), default=(DEFAULT_RANK, float(DEFAULT_RANK))
        )
        rank = block.rank if block else self.rank or file_rank
        alpha = block.alpha if block and block.alpha is not None else self.alpha
        if alpha is None:
            alpha = rank if self.alpha_policy == "rank" else rank * file_alpha / file_rank
        return rank, float(alpha)

    def _block(self, path: str) -> str | None:
        """The longest key of ``blocks`` that is above the module at the canonical ``path``; None if there is none."""
        return max((key for key in self.blocks if _is_below(path, self._path_of_block(key))), key=len, default=None)

    def _path_of_block(self, key: str) -> str:
        """Path in LoRA files of the module that the key of ``blocks`` names."""
        component, _, name = key.partition(".")
        folder = self.source.folder_of(component)
        return canonical(f"{folder}.{name}" if name else folder)

    def component_rates(self) -> Mapping[str, float | None]:
        return {"text_encoder": self.text_encoder_lr}

    def _chosen_projections(self) -> Sequence[LoRAProjection]:
        return get_args(LoRAProjection) if self.projections is None else self.projections

    def _denoiser_layers(self) -> list[str]:
        """Names of the denoiser's layers that are targets, without those that have no effect."""
        family, projections = self.backbone.facts.family, self._chosen_projections()
        targets = self.targets or family.default_targets
        names: list[str] = []
        for component, name, _ in layers(self.backbone):
            kind = family.lora_layer(name) if component == "denoiser" else None
            if kind is None or self._is_unused(component, name):
                continue
            target, projection = kind
            if target in targets and (projection is None or projection in projections):
                names.append(name)
        return names

    def _text_encoder_layers(self, component: str) -> list[str]:
        suffixes = [_TEXT_PROJECTIONS[p] for p in self._chosen_projections()]
        suffixes += ["fc1", "fc2"] if "feed_forward" in (self.targets or ()) else []
        return [
            n
            for n, m in self.backbone.encoders[component].named_modules()
            if isinstance(m, nn.Linear) and n.endswith(tuple(suffixes)) and not self._is_unused(component, n)
        ]

    def _inject_pairs(self, component: str, model: nn.Module, layer_names: list[str]) -> None:
        if not layer_names:
            return
        # peft also matches target_modules as suffixes; a full name matches exactly one module.
        settings = {name: self._rank_and_alpha(module_path(self.backbone, component, name)) for name in layer_names}
        config = LoraConfig(
            r=max(rank for rank, _ in settings.values()),
            target_modules=layer_names,
            rank_pattern={name: rank for name, (rank, _) in settings.items()},
            alpha_pattern={name: alpha for name, (_, alpha) in settings.items()},
            lora_dropout=self.dropout,
            use_rslora=self.alpha_policy == "rslora",
        )
        folder = self.source.folder_of(component)
        register_layers(config, {nn.Linear: FusedLoRALinear, nn.Conv2d: HalfLoRAConv2d})
        inject_adapter_in_model(config, model)
        for name, parameter in model.named_parameters():
            if "lora_" in name and parameter.dtype.itemsize == 2:
                parameter.data = parameter.data.float()  # peft creates the pair in the layer's dtype
            if "lora_A" in name:
                # Kaiming-uniform with a = sqrt(5), that is uniform in +-1 / sqrt(fan in). The random stream is
                # named after the parameter, so that its initial value does not depend on which other pairs exist.
                bound = parameter[0].numel() ** -0.5
                rng = generator(self.seed, f"{streams.INITIAL_VALUES}/{folder}.{name}")
                drawn = rng.uniform(-bound, bound, tuple(parameter.shape)).astype("float32")
                parameter.data.copy_(torch.from_numpy(drawn))

    def weights(self) -> LoRAWeights:
        """Current values of the pairs and their alphas, by diffusers module path."""
        pairs: dict[str, tuple[Tensor, Tensor]] = {}
        alphas: dict[str, float] = {}
        for component, name, module in self._lora_layers():
            path = module_path(self.backbone, component, name)
            down, up = (getattr(module, part)["default"].weight.detach() for part in ("lora_A", "lora_B"))
            pairs[path] = (down, up)
            rank, alpha = self._rank_and_alpha(path)
            # File formats define the scale as alpha / rank; convert the alpha of rsLoRA.
            alphas[path] = alpha * math.sqrt(rank) if self.alpha_policy == "rslora" else alpha
        return LoRAWeights(pairs, alphas)

    def write_artifact(self, folder: Path, name: str) -> None:
        """Write ``<name>.safetensors`` in kohya format and ``pytorch_lora_weights.safetensors`` in diffusers format."""
        self.write_snapshot(folder, name)
        write_diffusers(folder / FILE_NAME, self.weights(), self.artifact_metadata(folder / name))

    def artifact_bytes(self) -> int:
        """Size in bytes of the pairs in both files."""
        return 2 * super().artifact_bytes()

    def write_snapshot(self, folder: Path, name: str) -> None:
        """Write ``<name>.safetensors`` in kohya format."""
        data = getattr(self.trainer, "datamodule", None)
        family, prediction = self.backbone.facts.family, self.backbone.path.prediction_type
        spec = kohya_lora.ModelSpec(
            title=name,
            resolution=data.side if isinstance(data, ImageDataModule) else self.backbone.facts.side,
            prediction_type=model_spec_prediction(prediction),
            steps=self.trainer.global_step,
            seed=self.seed,
            trigger=data.trigger_words() if isinstance(data, ImageDataModule) else None,
            model=family.lora_names(prediction),
        )
        artifact_metadata, weights = self.artifact_metadata(folder / name), self.weights()
        if isinstance(data, ImageDataModule):
            artifact_metadata |= kohya_lora.training_metadata(
                data.name,
                itertools.islice(data.train.captions(), _MOST_CAPTIONS),
                int(data.train.repeats.sum()),
                self._base_rates(),
                self.source.clip_skip,
            )
        table = family.kohya_table(weights.pairs, dict(self.backbone.denoiser.config))
        kohya_lora.write(folder / f"{name}.safetensors", weights, spec, artifact_metadata, table)

    def _base_rates(self) -> dict[str, float]:
        """Learning rate of each component before the schedule."""
        groups = [group for optimizer in self.trainer.optimizers for group in optimizer.param_groups]
        return {str(group.get("name")): float(group.get("initial_lr", group["lr"])) for group in groups}


_MOST_CAPTIONS = 20_000
"""Captions whose tags are counted for the header of each snapshot."""


def _is_below(path: str, parent: str) -> bool:
    return path == parent or path.startswith(f"{parent}.")
