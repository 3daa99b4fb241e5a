"""Base class of all fine-tuning methods, ``Adapter``: training step, optimizer setup, checkpoint contents."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytorch_lightning as pl
import torch
from pytorch_lightning.core.optimizer import LightningOptimizer
from pytorch_lightning.trainer.states import TrainerFn
from torch import Tensor, nn

from sdtune import streams
from sdtune.backbone import Pretrained
from sdtune.backbone.backbone import Backbone
from sdtune.backbone.controlnet import ConditionEncoder
from sdtune.backbone.families import Component
from sdtune.backbone.loading import read_tokenizer
from sdtune.backbone.new_token_vectors import initialize_tokens, token_vectors
from sdtune.backbone.new_tokens import (
    NewToken,
    check_mentioned,
    check_tokens,
    check_vector_counts,
    check_vocabulary,
)
from sdtune.backbone.quantization import check_quantization, quantize
from sdtune.conditioning import Conditioning
from sdtune.data.datamodule import ImageDataModule
from sdtune.data.dataset import Batch
from sdtune.errors import UserError
from sdtune.formats import embeddings
from sdtune.hardware.precision import HALVES, autocast, default_dtype
from sdtune.lightning_compat import attached_trainer
from sdtune.loaders.lora import check_adapter
from sdtune.lr_schedule import Constant, LRSchedule, apply_current_rates
from sdtune.objective import Objective
from sdtune.progress import phase
from sdtune.torch_compat import set_supports_found_inf
from sdtune.training import random_draws as draws
from sdtune.training.adamw_by_size import AdamWBySize
from sdtune.training.arguments import Average, OptimizerFactory
from sdtune.training.caching import CachedParts, fill_caches, generate_class_images
from sdtune.training.checkpoint_contents import check_same_backbone, complete, keep_only_trained
from sdtune.training.cpu_offload import CpuOffload
from sdtune.training.executor import LocalExecutor, ModelExecutor
from sdtune.training.gradient_checkpointing import checkpoint_activations
from sdtune.training.nonfinite_guard import NonfiniteGuard
from sdtune.training.param_groups import param_groups

log = logging.getLogger("sdtune")

PARTS = ("#sum", "#count")
"""Suffixes of the two tensors of a metric that is a mean over the samples of one source."""

_ABSTRACT_METHODS = ("inject", "write_artifact")
"""Abstract methods of ``Adapter``; ``__abstractmethods__`` of a subclass is not set yet in ``__init_subclass__``."""


class Adapter(pl.LightningModule, ABC):
    """A fine-tuning method: makes parameters of a frozen backbone trainable, or adds new ones, and trains them.

    A subclass sets ``artifact_kind`` and ``denoiser_is_read_only`` and implements :meth:`inject` and
    :meth:`write_artifact`. It may override the other methods in the section "hooks".

    Args:
        backbone: the pretrained pipeline.
        objective: the diffusion loss.
        optimizer: creates the optimizer from parameter groups; AdamW with a learning rate of 1e-4 if None.
        lr_schedule: learning-rate schedule; constant after 100 warm-up steps if None.
        new_tokens: new words for prompts, whose embedding vectors are trained; the tokenizers are not changed.
        tokens_lr: learning rate of the new tokens; the optimizer's if None.
        gradient_checkpointing: recompute activations in the backward pass, to save memory.
        offload: keep the VAE and the text encoders in main memory if their outputs are cached.
        vae_tiling: decode large images in tiles, to save memory.
        seed: seed of the initial values and of all random numbers of a training step; validation uses the same noise
            for every seed.
    """

    artifact_kind: ClassVar[Literal["lora", "embeddings", "controlnet", "model"]]
    """Kind of the artifact: a LoRA, embeddings of new tokens, a ControlNet, or a full model."""

    trains_only_new_tokens: ClassVar[bool] = False
    """True if the method trains only new tokens."""

    denoiser_is_read_only: ClassVar[bool]
    """True if the method neither trains nor copies the denoiser's weights; they are then loaded in half precision if
    the run's precision is mixed.

    Each concrete class sets it in its own body and does not inherit it: a subclass may train more than its base class.
    """

    uses_class_images: ClassVar[bool] = False
    """True if the method trains on class images (prior preservation), unless ``data.prior_weight`` is 0."""

    condition_encoder: ConditionEncoder | None = None
    """Converts conditions (such as ``control``: control maps, float32 [B, 3, H, W] in [0, 1]) to those that
    :meth:`denoise` gets, with a frozen model of the backbone; the outputs are cached like latents. None: conditions are
    used as they are. A method sets it in :meth:`inject`.
    """

    parts: Sequence[Component] = ()
    """Components whose weights are all trained."""

    token_encoders: Sequence[str] | None = None
    """Text encoders that learn the new tokens; None: all that a method may train."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        abstract = any(getattr(getattr(cls, name, None), "__isabstractmethod__", False) for name in _ABSTRACT_METHODS)
        if not abstract and "denoiser_is_read_only" not in vars(cls):
            raise TypeError(
                f"{cls.__qualname__} must set denoiser_is_read_only in its own class body: True if the denoiser's"
                " weights are neither trained nor copied"
            )

    def __init__(
        self,
        *,
        backbone: Pretrained | None = None,
        objective: Objective | None = None,
        optimizer: OptimizerFactory | None = None,
        lr_schedule: LRSchedule | None = None,
        new_tokens: Sequence[NewToken] = (),
        tokens_lr: float | None = None,
        gradient_checkpointing: bool = False,
        offload: bool = False,
        vae_tiling: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_tokens(new_tokens)
        if self.trains_only_new_tokens and not new_tokens:
            raise UserError(
                "the list is empty, but this method trains only new tokens",
                key="new_tokens",
                remedy="set 'new_tokens=[{token: \"<my_cat>\", init: cat}]'",
            )
        self.source = backbone or Pretrained()
        self.objective = objective or Objective()
        self.make_optimizer: OptimizerFactory = optimizer or (
            lambda groups: torch.optim.AdamW(groups, lr=1e-4, fused=True)
        )
        self.lr_schedule = lr_schedule or Constant(warmup_steps=100)
        self.new_tokens, self.tokens_lr, self.seed = tuple(new_tokens), tokens_lr, seed
        self.gradient_checkpointing, self.offload, self.vae_tiling = gradient_checkpointing, offload, vae_tiling
        self.backbone: Backbone
        self.executor: ModelExecutor = LocalExecutor()
        """Computes predictions and gradients; replaced when several runs share a backbone."""
        self.step_metrics: dict[str, Tensor] = {}
        """Metrics of the current optimizer step, as tensors on the device: losses, gradient norm, finiteness."""
        self.cpu_offload, self.guard = CpuOffload(), NonfiniteGuard()
        self.displayed_metrics: dict[str, float] = {}
        """Metrics that were last copied from the device, for the progress bar."""
        self.average: Average | None = None
        """Average of the trained weights (EMA); set by a callback."""
        self._denoiser_is_half = False
        self._validation_sums: dict[str, Any] = {}
        self.validation_aborted = False
        """Whether the run stops in the current validation, which has no result; set by the callback ``Checkpoints``."""

    # --- hooks: implemented or overridden by a method

    @abstractmethod
    def inject(self) -> None:
        """Make parameters of the backbone trainable, or add trainable modules.

        All parameters are frozen before the call. The base class adds the new tokens and makes them trainable.
        """

    @abstractmethod
    def write_artifact(self, folder: Path, name: str) -> None:
        """Write the current trained weights in the formats that other programs load, except the new tokens.

        Args:
            folder: the artifact folder.
            name: name of the file or subfolder to write, without extension.
        """

    def write_snapshot(self, folder: Path, name: str) -> None:
        """Write an intermediate artifact named ``name``; by default the same files as :meth:`write_artifact`."""
        self.write_artifact(folder, name)

    def check_data(self, data: ImageDataModule) -> None:
        """Raise UserError if the method cannot be trained on ``data``.

        Called before the backbone is loaded, and again when training starts; it must not need loaded weights.
        """

    def artifact_bytes(self) -> int:
        """Size in bytes of the tensors that :meth:`artifact` writes; by default the trained parameters in float32."""
        return sum(4 * p.numel() for _, p in self.trainable())

    def component_rates(self) -> Mapping[str, float | None]:
        """Learning rates by component; the optimizer's learning rate for None and for components not listed.

        A component is ``denoiser``, ``text_encoder`` (all text encoders), ``vae``, or a module added by :meth:`inject`.
        """
        return {}

    def denoise(
        self, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning, conditions: Mapping[str, Tensor]
    ) -> Tensor:
        """Denoiser output [B, C, h, w]; previews call it too, so that they use the same computation as training.

        Args:
            noisy: noisy latents [B, C, h, w].
            timesteps: [B] in training; in previews one timestep of the sampler, without dimensions.
            conditioning: text embeddings and sizes.
            conditions: inputs of modules beside the denoiser by name, such as ``control``; see
                :attr:`condition_encoder`.
        """
        return self._predict(self.backbone.denoiser_inputs(noisy, timesteps, conditioning))

    def _predict(self, inputs: dict[str, Any]) -> Tensor:
        """Denoiser output for ``inputs`` (:meth:`Backbone.denoiser_inputs`).

        A frozen denoiser in half precision is computed without autocast: a third of autocast's kernels would be casts.
        """
        with autocast(self.device, "32-true") if self._denoiser_is_half else nullcontext():
            return self.executor.predict(self.backbone.denoiser, inputs)

    def synthetic_batch(self, batch: Batch, pixels: Tensor) -> Batch:
        """Add placeholder values for the inputs that the method reads in addition to images and text.

        ``sdtune plan`` measures a training step with this batch.

        Args:
            batch: a batch of images and text.
            pixels: images [B, 3, H, W].
        """
        return batch

    def extra_losses(self, batch: Batch) -> dict[str, Tensor]:
        """Scalar loss terms that are added to the diffusion loss, by metric name."""
        return {}

    # --- the model

    def trainable(self) -> list[tuple[str, nn.Parameter]]:
        """The trainable parameters with their names, in module order."""
        return [(name, p) for name, p in self.named_parameters() if p.requires_grad]

    def configure_model(self) -> None:
        """Load the backbone and call :meth:`inject` once; cast the weights and prepare them for the device."""
        fitting = attached_trainer(self) is not None and self.trainer.state.fn == TrainerFn.FITTING
        half_dtype = HALVES.get(str(self.trainer.precision)) if fitting else None
        if not hasattr(self, "backbone"):
            if fitting and isinstance(self.executor, LocalExecutor):
                self._generate_class_images()
            with phase(f"Loading {Path(self.source.path).name}"):
                self.backbone = self.source.load(self.seed, half_dtype if self.denoiser_is_read_only else None)
            # Lightning makes the run's device the default device; create new modules on the backbone's device instead.
            with self.backbone.device:
                self._build()
        if attached_trainer(self) is not None:
            # Do not cast a backbone that other runs share. Cast before moving: the device may lack memory for float32
            # weights.
            if half_dtype and self.backbone.pair_executor is None:
                self.backbone.cast_frozen(str(self.trainer.precision))
            if self.backbone.pair_executor is None:
                quantize(self.backbone, self.source.quantize)
            # Set the memory layout before DDP wraps the model: DDP builds its gradient buckets from the strides.
            self.prepare_for_device(self.trainer.strategy.root_device)

    def _generate_class_images(self) -> None:
        """Generate the class images of the data before the model is loaded and moved to the device."""
        data = getattr(self.trainer, "datamodule", None)
        if not isinstance(data, ImageDataModule):
            return
        data.open(self.source.facts.side, self.source.facts.factor)
        # Lightning calls configure_model with the device, and in 64-true the dtype, of the training as defaults.
        with torch.device("cpu"), default_dtype(torch.float32):
            generate_class_images(
                self.source, self.seed, str(self.trainer.precision), self.vae_tiling, data, self.trainer
            )

    def prepare_for_device(self, device: torch.device) -> None:
        """Set the attention implementation and the memory layout for ``device``."""
        self.backbone.prepare_for_device(
            device, *[model for model in self.children() if hasattr(model, "set_attn_processor")]
        )

    def _build(self) -> None:
        if self.new_tokens:
            initialize_tokens(self.backbone, self.new_tokens, self.token_encoders)
        self.inject()
        registered = {id(parameter) for parameter in self.parameters()}
        for vectors in self.backbone.new_token_vectors:
            vectors.requires_grad_(True)
            if id(vectors) not in registered:
                self.waiting_vectors = vectors  # those of T5, which is no submodule
            if vectors.dtype in HALVES.values():  # the embedding tables of a shared backbone on a GPU
                vectors.data = vectors.data.float()
        # diffusers and transformers apply gradient checkpointing only in training mode.
        self.backbone.denoiser.train()
        for encoder in self.backbone.trainable_encoders.values():
            encoder.train(self.trains("text_encoder"))
        if self.gradient_checkpointing:
            checkpoint_activations(self)
        if self.vae_tiling:
            self.backbone.decode_in_tiles()
        trainable = self.trainable()
        assert trainable, "inject() made no parameter trainable"
        self._trains_only_vae = all(name.startswith("backbone.vae.") for name, _ in trainable)

    def artifact(self, folder: Path, name: str) -> None:
        """Write the current trained weights and new tokens in the formats that other programs load."""
        self.write_artifact(folder, name)
        self._write_new_tokens(folder, name, "")

    def snapshot(self, folder: Path, name: str, suffix: str) -> None:
        """Write an intermediate artifact and new tokens.

        Args:
            folder: the artifact folder.
            name: name of the file or subfolder, without extension.
            suffix: suffix for the names of the new tokens' files, such as ``-step00000400``.
        """
        self.write_snapshot(folder, name)
        self._write_new_tokens(folder, name, suffix)

    def _write_new_tokens(self, folder: Path, name: str, suffix: str) -> None:
        if self.new_tokens:
            embeddings.write(folder, token_vectors(self.backbone), suffix, self.artifact_metadata(folder / name))

    def artifact_metadata(self, artifact: Path) -> dict[str, str]:
        """Metadata for the artifact's files: the hash of the backbone that they must be loaded onto.

        Args:
            artifact: path of the artifact without extension; of a full model, its folder, which is already written.
        """
        return {"sdtune_backbone_hash": self.source.hash()}

    def final_weights(self) -> AbstractContextManager[None]:
        """Context manager that swaps in the weights of the final artifact: the average, if there is one."""
        return self.average.swapped_parameters(self) if self.average is not None else nullcontext()

    def trains(self, component: str) -> bool:
        """Whether any parameter of ``component`` of the backbone is trained; ``text_encoder``: any text encoder."""
        encoders = self.backbone.encoders
        models = encoders.values() if component == "text_encoder" else [getattr(self.backbone, component)]
        return any(p.requires_grad for model in models for p in model.parameters())

    def on_fit_start(self) -> None:
        self.backbone.path.to(self.device)
        self._denoiser_is_half = all(
            parameter.dtype in HALVES.values() or "lora_" in name or not parameter.is_floating_point()
            for name, parameter in self.backbone.denoiser.named_parameters()
        )
        data = getattr(self.trainer, "datamodule", None)
        if isinstance(data, ImageDataModule):
            data.open(self.source.facts.side, self.source.facts.factor)
            check_trainable(self, data)
            warn_if_distilled(self.source.path)
            for side in {side for size in data.buckets.sizes for side in size}:
                self.source.facts.check_side(side, "data.resolution")
            fill_caches(self._cached_parts(), data, self.trainer)
            self.backbone.waiting_states = data.caches.waiting_states
            if data.caches.text is None:
                is_cached = data.caches.waiting is not None
                in_each_step = self.backbone.trainable_encoders if is_cached else self.backbone.encoders
                for encoder in in_each_step.values():
                    encoder.to(self.device)
            if self.offload:
                vae: list[nn.Module] = [self.backbone.vae] if data.caches.latents is not None else []
                encoders = list(self.backbone.trainable_encoders.values()) if data.caches.text is not None else []
                self.cpu_offload = CpuOffload(vae, encoders, self.device)

    def _cached_parts(self) -> CachedParts:
        return CachedParts(
            backbone=self.backbone,
            source=self.source,
            seed=self.seed,
            device=self.device,
            precision=str(self.trainer.precision),
            encode_text=self.encode_text,
            vae_tiling=self.vae_tiling,
            frozen_vae=not self.trains("vae"),
            frozen_text=not self.trains("text_encoder"),
            frozen_waiting=self.backbone.waiting_are_frozen,
            encode_conditions=self.condition_encoder,
        )

    def on_train_start(self) -> None:
        for config in self.trainer.lr_scheduler_configs:
            apply_current_rates(config.scheduler)

    def encode_text(self, prompts: Sequence[str]) -> Conditioning:
        """Text embeddings; with gradients only if a text encoder is trained."""
        # Outside of a training step Lightning's autocast is off, but frozen half-precision weights need it.
        with self._autocast(), torch.set_grad_enabled(torch.is_grad_enabled() and self.trains("text_encoder")):
            return self.backbone.encode_text(prompts)

    def _autocast(self) -> torch.autocast:
        """Autocast of the run's precision, for code outside of a training step."""
        return autocast(self.device, str(self.trainer.precision) if attached_trainer(self) is not None else "32-true")

    # --- training step

    def noise(self, shape: Sequence[int], stream: str, step: int, positions: Iterable[int]) -> Tensor:
        """Standard normal noise, float32 [len(positions), *shape].

        Args:
            stream: name of the random stream, such as ``train/noise``; validation streams use seed 0.
            step: optimizer step.
            positions: position of each sample in the batch of its step (:class:`sdtune.data.order.ScheduledSample`).
        """
        return draws.noise(shape, self.seed, stream, step, positions, self.device)

    def _moments(self, batch: Batch) -> Tensor:
        """Moments [B, 2C, h, w] of the VAE's posterior, encoded once per batch and stored in it."""
        if "moments" not in batch:
            with torch.set_grad_enabled(torch.is_grad_enabled() and self.trains("vae")):
                batch["moments"] = self.backbone.encode_images(batch["pixels"])
        moments: Tensor = batch["moments"]
        return moments

    def _conditions(self, batch: Batch) -> Mapping[str, Tensor]:
        """Conditions for :meth:`denoise`."""
        if "encoded_conditions" in batch:
            return batch["encoded_conditions"]  # type: ignore[no-any-return]
        given: Mapping[str, Tensor] = batch["conditions"]
        return given if self.condition_encoder is None else self.condition_encoder(given)

    def losses(self, batch: Batch, stream: str = streams.TRAIN) -> Tensor:
        """Diffusion loss of each sample, float32 [B].

        Args:
            batch: see :data:`sdtune.data.dataset.Batch`.
            stream: ``train`` or ``validation``, the prefix of the random streams; validation uses the unweighted loss
                (L_simple), so that curves of different objectives are comparable.
        """
        step, positions, moments = batch["step"], batch["positions"], self._moments(batch)
        objective = self.objective if stream == streams.TRAIN else self.objective.plain()
        shape = (moments.shape[1] // 2, *moments.shape[2:])
        # detach(): the diffusion loss must not train the VAE; it would shrink the latents towards zero.
        clean = self.backbone.latents(moments.detach(), self.noise(shape, f"{stream}/{streams.VAE}", step, positions))
        noise = self.noise(shape, f"{stream}/{streams.NOISE}", step, positions)
        if objective.offset_noise:
            offset = self.noise((shape[0], 1, 1), f"{stream}/{streams.OFFSET}", step, positions)
            noise = noise + objective.offset_noise * offset
        path = self.backbone.path
        t = draws.times(path, objective.timesteps, self.seed, stream, step, positions, self.device)
        cached = batch.get("conditioning")
        text = self.encode_text(batch["prompts"]) if cached is None else cached
        conditioning = replace(text, frame=batch.get("frame"))
        noisy = path.sample(clean, noise, t)
        output = self.denoise(noisy, path.timesteps(t), conditioning, self._conditions(batch))
        return objective(output, path=path, clean=clean, noise=noise, t=t, mask=batch.get("mask"))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        draws.seed_dropout(self.seed, self.global_rank, int(batch["step"]), batch_idx, self.device)
        terms, loss = self._diffusion_terms(batch)
        extra = self.extra_losses(batch)
        terms |= extra
        loss = loss + sum(extra.values())
        is_first = batch_idx % self.trainer.accumulate_grad_batches == 0
        previous = {} if is_first else self.step_metrics
        weight = 1 / self.trainer.accumulate_grad_batches
        sums = {key: terms.pop(key) for key in [*terms] if key.endswith(PARTS)}
        # A single term equals the loss.
        metrics = {"loss": loss, **(terms if len(terms) > 1 else {}), **sums}
        averages = {key: previous.get(key, 0) + value.detach() * weight for key, value in metrics.items()}
        self.step_metrics = {**previous, **averages}
        return loss

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        self.executor.backward(loss, *args, **kwargs)

    def _diffusion_terms(self, batch: Batch) -> tuple[dict[str, Tensor], Tensor]:
        """Metrics of the diffusion loss, and the scalar to minimize: subject loss plus weighted prior loss."""
        if self._trains_only_vae:
            # The diffusion loss has no gradient for the VAE, but extra_losses() reads the moments.
            self._moments(batch)
            return {}, torch.zeros((), device=self.device)
        per_sample = self.losses(batch)
        subject_count = batch.get("subject_count", len(per_sample))
        has_prior = subject_count < len(per_sample)
        if "sources" in batch:
            return self._terms_of_mix(per_sample, batch, subject_count)
        terms = {"loss/diffusion": per_sample[:subject_count].mean()}
        if has_prior:
            # Ruiz et al. 2023, eq. 2. The prior term has a separate mean, so that its weight is independent of B.
            terms["loss/prior"] = per_sample[subject_count:].mean()
            return terms, terms["loss/diffusion"] + batch["prior_weight"] * terms["loss/prior"]
        return terms, terms["loss/diffusion"]

    def _terms_of_mix(self, per_sample: Tensor, batch: Batch, subject_count: int) -> tuple[dict[str, Tensor], Tensor]:
        """As :meth:`_diffusion_terms`, with the same terms for steps with and without class images, and of each source.

        The terms are sums and counts, because the batches of a step differ in them; the loss is weighted.
        """
        data: ImageDataModule = self.trainer.datamodule  # type: ignore[attr-defined]
        losses = per_sample.detach().float()
        parts = {"diffusion": losses[:subject_count], **({"prior": losses[subject_count:]} if data.has_prior else {})}
        terms = {
            f"loss/{name}{suffix}": value
            for name, part in parts.items()
            for suffix, value in zip(PARTS, (part.sum(), part.new_full((), len(part))), strict=True)
        }
        weights = batch.get("weights")
        weighted = per_sample if weights is None else per_sample * weights
        loss = weighted[:subject_count].mean()
        if subject_count < len(per_sample):
            loss = loss + (batch["prior_weight"] if weights is None else 1) * weighted[subject_count:].mean()
        return {**terms, **self._source_sums(per_sample, batch, "loss")}, loss

    def _source_sums(self, per_sample: Tensor, batch: Batch, metric: str) -> dict[str, Tensor]:
        """Sum of the losses of each source of a mix, and number of its samples, as ``<metric>/source/<name>#sum``."""
        if "sources" not in batch:
            return {}
        data: ImageDataModule = self.trainer.datamodule  # type: ignore[attr-defined]
        sums, counts = per_sample.detach().float() @ batch["sources"], batch["sources"].sum(0)
        return {
            f"{metric}/source/{name}{part}": values[number]
            for number, name in enumerate(data.parts)
            for part, values in zip(PARTS, (sums, counts), strict=True)
        }

    def on_validation_epoch_start(self) -> None:
        self._validation_sums, self.validation_aborted = {}, False

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        if not batch.get("counts", True):
            return  # the processes have equal numbers of batches, but not of images
        per_sample = self.losses(batch, streams.VALIDATION)
        count = len(per_sample)
        total = {"validation_loss#sum": per_sample.mean() * count, "validation_loss#count": torch.tensor(float(count))}
        for key, value in (total | self._source_sums(per_sample, batch, "validation_loss")).items():
            self._validation_sums[key] = self._validation_sums.get(key, 0) + value

    def on_validation_epoch_end(self) -> None:
        """Divide the sums over all processes by the counts."""
        if self.validation_aborted:
            return
        names = ["validation_loss", *source_validation_metrics(self.trainer)]
        parts = [self._validation_sums.get(f"{name}{part}", 0.0) for name in names for part in PARTS]
        table = torch.stack([torch.as_tensor(part, dtype=torch.float32, device=self.device) for part in parts])
        if self.trainer.world_size > 1:
            table = self.trainer.strategy.reduce(table, reduce_op="sum")
        for name, total, count in zip(names, table[0::2], table[1::2], strict=True):
            # logger=False: MetricsRecorder sends the values to the loggers, with the same step as in metrics.csv.
            self.log(name, total / count, sync_dist=True, logger=False)

    # --- the optimizer

    def optimizer_groups(self) -> list[dict[str, Any]]:
        """Optimizer parameter groups: one per component, with its ``name``, and one named ``tokens`` for new tokens."""
        vector_ids = {id(vectors) for vectors in self.backbone.new_token_vectors}
        component_parameters = [(name, p) for name, p in self.trainable() if id(p) not in vector_ids]
        groups = param_groups(component_parameters, self.component_rates())
        if self.backbone.new_token_vectors:
            # No weight decay: it would pull the embedding vectors towards zero.
            lr_override = {} if self.tokens_lr is None else {"lr": self.tokens_lr}
            groups.append(
                {"name": "tokens", "params": self.backbone.new_token_vectors, "weight_decay": 0.0, **lr_override}
            )
        return groups

    def configure_optimizers(self) -> Any:
        optimizer: Any = self.make_optimizer(self.optimizer_groups())
        if self.trainer.precision == "16-mixed":
            # A fused optimizer would unscale the gradients inside its step; clipping needs them unscaled before.
            set_supports_found_inf(optimizer, False)
        total = self.trainer.max_steps
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: self.lr_schedule(step, total))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the global gradient norm, record it as a metric, and skip a non-finite step without a device sync."""
        scaled = self.trainer.precision == "16-mixed"
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        loss = self.step_metrics["loss"]
        self.step_metrics |= self.guard.clip(optimizer, parameters, gradient_clip_val, loss, scaled)

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: torch.optim.Optimizer | LightningOptimizer,
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> None:
        """Free the gradients after the step; Lightning keeps them until after the next forward pass."""
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        optimizer.zero_grad()

    # --- checkpoints: only trained tensors

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        keep_only_trained(checkpoint, [name for name, _ in self.trainable()])
        checkpoint["sdtune"] = {"backbone": self.source.hash(), "method": type(self).__name__}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the frozen tensors to a checkpoint, which has only the trained ones.

        Raises:
            UserError: the checkpoint was trained on another backbone, or has other tensors than this method trains.
        """
        check_same_backbone(checkpoint["sdtune"]["backbone"], self.source)
        complete(checkpoint, [name for name, _ in self.trainable()], self.state_dict())


def source_validation_metrics(trainer: pl.Trainer) -> list[str]:
    """Names of the validation losses of the sources of a mix that have held-out images; none for other data."""
    data = getattr(trainer, "datamodule", None)
    if not isinstance(data, ImageDataModule) or len(data.parts) == 1:
        return []
    return [f"validation_loss/source/{name}" for name, source in data.parts.items() if source.held_out]


def warn_if_distilled(path: str) -> None:
    """Log a warning if the name of the model says that it is distilled for few steps; its configs do not say it."""
    if "turbo" in Path(path).name.lower():
        log.warning(
            "WARNING: %s seems to be a Turbo model; training undoes its distillation: train the model that it"
            " was made of, and use the LoRA with both",
            path,
        )


def check_trainable(adapter: Adapter, data: ImageDataModule) -> None:
    """Check that ``adapter`` can be trained on ``data``, without loading any weights.

    Raises:
        UserError: :meth:`Adapter.check_data` fails; the loss weighting has no meaning for the model; a component with
            random weights is not trained; ``backbone.quantize`` is not possible; 8-bit states need a missing package; a
            file with initial embeddings is missing; a new token has more vectors than fit into a prompt, is already a
            word of the vocabulary, or is in no prompt and would not be trained.
    """
    untrained = [part for part in adapter.source.from_scratch if part not in adapter.parts]
    if untrained:
        raise UserError(
            f"{untrained[0]} has random weights and is not trained",
            key="backbone.from_scratch",
            remedy=f"add {untrained[0]} to method.parts (method=full), or remove it from backbone.from_scratch",
        )
    adapter.objective.check(adapter.source.facts.prediction_type)
    check_quantization(adapter.source.quantize, adapter.parts)
    trains_models = bool(adapter.parts) or adapter.artifact_kind == "controlnet"
    if trains_models and isinstance(adapter.make_optimizer, AdamWBySize):
        adapter.make_optimizer.check_installed()
    for token in adapter.new_tokens:
        if token.weights is not None:
            check_adapter(token.weights, adapter.source.hash(), "new_tokens")
    adapter.check_data(data)
    if adapter.new_tokens:
        counts = {token.token: token.vectors for token in adapter.new_tokens}
        for encoder in adapter.token_encoders or ("text_encoder",):
            check_vector_counts(counts, adapter.source.facts, encoder, "new_tokens")
        for folder in adapter.source.tokenizer_folders(adapter.token_encoders):
            check_vocabulary(adapter.new_tokens, read_tokenizer(folder))
        check_mentioned(adapter.new_tokens, data.all_prompts())
