"""``Adapter``, base class of all fine-tuning methods: training step, optimizer setup, checkpoint contents."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytorch_lightning as pl
import torch
from pytorch_lightning.trainer.states import TrainerFn
from torch import Tensor, nn

from sdtune import streams
from sdtune.backbone import Pretrained
from sdtune.backbone.backbone import Backbone
from sdtune.backbone.families import Component
from sdtune.backbone.new_tokens import NewToken, check_mentioned, check_tokens
from sdtune.backbone.words import begin_tokens, word_vectors
from sdtune.data.datamodule import ImageDataModule
from sdtune.data.dataset import Batch
from sdtune.errors import UserError
from sdtune.formats import embeddings
from sdtune.hardware.precision import HALVES, autocast
from sdtune.lightning_compat import attached_trainer
from sdtune.loaders.lora import check_file
from sdtune.lr_schedule import Constant, LRSchedule, take_rates
from sdtune.objective import Objective
from sdtune.torch_compat import set_takes_found_inf
from sdtune.training import random_draws as draws
from sdtune.training.arguments import Average, MakeOptimizer
from sdtune.training.caching import CachedParts, fill_caches
from sdtune.training.checkpoint_contents import check_same_backbone, complete, only_trained
from sdtune.training.cpu_offload import CpuOffload
from sdtune.training.executor import LocalExecutor, ModelExecutor
from sdtune.training.gradient_checkpointing import checkpoint_activations
from sdtune.training.nonfinite_guard import Guard
from sdtune.training.param_groups import param_groups

_ABSTRACT = ("inject", "write_artifact")
"""What a subclass must define before it can be trained; ABC itself looks only after ``__init_subclass__``."""


class Adapter(pl.LightningModule, ABC):
    """One way to fine-tune, over a frozen backbone.

    A subclass says which parts it opens or inserts (:meth:`inject`) and what it leaves behind
    (:meth:`write_artifact`), and where it must, how it denoises. It overrides nothing else.
    """

    artifact_kind: ClassVar[Literal["lora", "words", "controlnet", "model"]]
    """What kind of artifact it writes, of those that ``sdtune export`` knows."""

    needs_tokens: ClassVar[bool] = False
    """Whether there is nothing to train without new tokens."""

    reads_denoiser_only: ClassVar[bool]
    """Whether the UNet's weights are neither trained nor copied, so may be read in half precision.

    Each class that can be trained states it in its own body: a subclass may train more than its base.
    """

    uses_class_images: ClassVar[bool] = False
    """Whether it trains on images of the class, unless ``data.prior_weight`` is 0."""

    parts: Sequence[Component] = ()
    """The components that are trained whole."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        abstract = any(getattr(getattr(cls, name, None), "__isabstractmethod__", False) for name in _ABSTRACT)
        if not abstract and "reads_denoiser_only" not in vars(cls):
            raise TypeError(
                f"{cls.__qualname__} must state reads_denoiser_only in its own body: True where the UNet's weights are"
                " neither trained nor copied"
            )

    def __init__(
        self,
        *,
        backbone: Pretrained | None = None,
        objective: Objective | None = None,
        optimizer: MakeOptimizer | None = None,
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
        if self.needs_tokens and not new_tokens:
            raise UserError("new_tokens is empty: give 'new_tokens=[{token: \"<my_cat>\", init: cat}]'")
        self.source = backbone or Pretrained()
        self.objective = objective or Objective()
        self.make_optimizer: MakeOptimizer = optimizer or (
            lambda groups: torch.optim.AdamW(groups, lr=1e-4, fused=True)
        )
        self.lr_schedule = lr_schedule or Constant(warmup_steps=100)
        self.new_tokens, self.tokens_lr, self.seed = tuple(new_tokens), tokens_lr, seed
        self.gradient_checkpointing, self.offload, self.vae_tiling = gradient_checkpointing, offload, vae_tiling
        self.backbone: Backbone
        self.executor: ModelExecutor = LocalExecutor()
        """Computes predictions and gradients; a session that shares a backbone sets its own."""
        self.step_metrics: dict[str, Tensor] = {}
        """Metrics of the optimizer step just made, still on the device: losses, gradient norm, finiteness."""
        self.offloaded, self.guard = CpuOffload(), Guard()
        self.flushed: dict[str, float] = {}
        """The last metrics brought over from the device, for the progress bar."""
        self.average: Average | None = None
        """Set by a callback that keeps an average of the trained weights."""

    # --- what a method says

    @abstractmethod
    def inject(self) -> None:
        """Open or insert the trainable parts; everything is frozen before. New tokens are opened beside them."""

    @abstractmethod
    def write_artifact(self, folder: Path, name: str) -> None:
        """Write what other programs load, from the weights as they are now; new tokens are written beside it."""

    def write_snapshot(self, folder: Path, stem: str) -> None:
        """Write an intermediate artifact; by default what :meth:`write_artifact` writes, under ``stem``."""
        self.write_artifact(folder, stem)

    def check_data(self, data: ImageDataModule) -> None:
        """UserError for data that the method cannot be trained on; called before any weights are loaded."""

    def artifact_bytes(self) -> int:
        """Size of what :meth:`artifact` writes, file headers apart; by default the trained parameters in float32."""
        return sum(4 * p.numel() for _, p in self.trainable())

    def component_rates(self) -> Mapping[str, float | None]:
        """The learning rates of components that have one of their own; the optimizer's for the others.

        A component is ``unet``, ``text_encoder`` (all of them), ``vae``, or a module that :meth:`inject` has added.
        """
        return {}

    def denoise(self, noisy: Tensor, timesteps: Tensor, text: Tensor, batch: Batch) -> Tensor:
        """The UNet's output [B, C, h, w]; sampling calls it too, so a preview cannot drift from training."""
        inputs = self.backbone.unet_inputs(noisy, timesteps, text, frame=batch.get("frame"))
        return self.executor.predict(self.backbone.unet, inputs)

    @classmethod
    def synthetic_batch(cls, batch: Batch, pixels: Tensor) -> Batch:
        """``batch`` with what the method reads from one beside images and text, of meaningless values.

        ``sdtune plan`` counts a training step with it.

        Args:
            pixels: [B, 3, H, W], the images.
        """
        return batch

    def extra_losses(self, batch: Batch) -> dict[str, Tensor]:
        """Further terms of the loss, each a scalar."""
        return {}

    # --- the model

    def trainable(self) -> list[tuple[str, nn.Parameter]]:
        """The open parameters with their names, in the module's order."""
        return [(name, p) for name, p in self.named_parameters() if p.requires_grad]

    def configure_model(self) -> None:
        """Load the backbone, freeze it, inject, once; and suit the run's device, which Lightning asks for each time."""
        fitting = attached_trainer(self) is not None and self.trainer.state.fn == TrainerFn.FITTING
        half = HALVES.get(str(self.trainer.precision)) if fitting else None
        if not hasattr(self, "backbone"):
            self.backbone = self.source.load(self.seed, half if self.reads_denoiser_only else None)
            # Lightning makes the run's device the default here; what is made beside the weights is to lie with them.
            with self.backbone.device:
                self._build()
        if attached_trainer(self) is not None:
            # A backbone that other runs share is not this run's to cast. Before moving: the device may lack memory for
            # float32 weights.
            if half and self.backbone.pair_executor is None:
                self.backbone.cast_frozen(str(self.trainer.precision))
            # Before DDP wraps the model: it maps gradients to its buckets by the strides that it finds then.
            self.prepare_for_device(self.trainer.strategy.root_device)

    def prepare_for_device(self, device: torch.device) -> None:
        """Attention and memory layout for ``device``."""
        self.backbone.prepare_for_device(
            device, *[model for model in self.children() if hasattr(model, "set_attn_processor")]
        )

    def _build(self) -> None:
        if self.new_tokens:
            begin_tokens(self.backbone, self.new_tokens)
        self.inject()
        for vectors in self.backbone.learned:
            vectors.requires_grad_(True)
        # diffusers and transformers checkpoint activations in training mode alone.
        self.backbone.unet.train()
        for encoder in self.backbone.encoders.values():
            encoder.train(self.open("text_encoder"))
        if self.gradient_checkpointing:
            checkpoint_activations(self)
        if self.vae_tiling:
            self.backbone.decode_in_tiles()
        opened = self.trainable()
        assert opened, "inject() opened nothing"
        self._vae_alone = all(name.startswith("backbone.vae.") for name, _ in opened)

    def artifact(self, folder: Path, name: str) -> None:
        """Write everything that other programs load, from the weights as they are now."""
        self.write_artifact(folder, name)
        self._write_words(folder, name, "")

    def snapshot(self, folder: Path, stem: str, mark: str) -> None:
        """Write an intermediate artifact; ``stem`` names its files, which end in ``mark``."""
        self.write_snapshot(folder, stem)
        self._write_words(folder, stem, mark)

    def _write_words(self, folder: Path, stem: str, mark: str) -> None:
        if self.new_tokens:
            embeddings.write(folder, word_vectors(self.backbone), mark, self.about(folder / stem))

    def about(self, artifact: Path) -> dict[str, str]:
        """Metadata of the files that go onto a backbone; ``artifact`` is what has just been written."""
        return {"sdtune_backbone_hash": self.source.hash()}

    def final_weights(self) -> AbstractContextManager[None]:
        """Within it, the weights are those that a run leaves behind: the average where one is kept."""
        return self.average.swapped(self) if self.average is not None else nullcontext()

    def open(self, component: str) -> bool:
        """Whether any parameter of the backbone's ``component`` is trained; ``text_encoder`` stands for all of them."""
        models = self.backbone.encoders.values() if component == "text_encoder" else [getattr(self.backbone, component)]
        return any(p.requires_grad for model in models for p in model.parameters())

    def on_fit_start(self) -> None:
        self.backbone.schedule.to(self.device)
        data = getattr(self.trainer, "datamodule", None)
        if isinstance(data, ImageDataModule):
            data.open(self.source.facts.side, self.source.facts.factor)
            check_trainable(self, data)
            fill_caches(self._cached_parts(), data, self.trainer)
            if self.offload:
                parts: list[nn.Module] = [self.backbone.vae] if data.latent_cache is not None else []
                parts += self.backbone.encoders.values() if data.text_cache is not None else []
                self.offloaded = CpuOffload(parts, self.device)

    def _cached_parts(self) -> CachedParts:
        return CachedParts(
            backbone=self.backbone,
            source=self.source,
            seed=self.seed,
            device=self.device,
            precision=str(self.trainer.precision),
            encode_text=self.encode_text,
            autocast=self._autocast,
            frozen_vae=not self.open("vae"),
            frozen_text=not self.open("text_encoder"),
        )

    def on_train_start(self) -> None:
        for config in self.trainer.lr_scheduler_configs:
            take_rates(config.scheduler)

    def encode_text(self, prompts: Sequence[str]) -> Tensor:
        """Text states; frozen half-precision weights need autocast also outside a training step."""
        with self._autocast(), torch.set_grad_enabled(torch.is_grad_enabled() and self.open("text_encoder")):
            return self.backbone.encode_text(prompts)

    def _autocast(self) -> torch.autocast:
        """The run's autocast, for work outside of a training step."""
        return autocast(self.device, str(self.trainer.precision) if attached_trainer(self) is not None else "32-true")

    # --- a step

    def noise(self, shape: Sequence[int], stream: str, step: int, positions: Iterable[int]) -> Tensor:
        """Standard normal [len(positions), *shape]; ``stream`` names the draw."""
        return draws.noise(shape, self.seed, stream, step, positions, self.device)

    def _moments(self, batch: Batch) -> Tensor:
        """The VAE's moments [B, 2C, h, w], encoded once per step and kept in the batch."""
        if "moments" not in batch:
            with torch.set_grad_enabled(torch.is_grad_enabled() and self.open("vae")):
                batch["moments"] = self.backbone.encode_images(batch["pixels"])
        moments: Tensor = batch["moments"]
        return moments

    def losses(self, batch: Batch, stream: str = streams.TRAIN) -> Tensor:
        """The diffusion loss of each sample, float32 [B].

        Args:
            stream: ``train`` or ``validation``: names the draws; validation has L_simple, so that curves compare.
        """
        step, positions, moments = batch["step"], batch["positions"], self._moments(batch)
        objective = self.objective if stream == streams.TRAIN else self.objective.plain()
        shape = (moments.shape[1] // 2, *moments.shape[2:])
        # The UNet learns latents of a VAE held fixed: through them the loss would shrink the latents to nothing.
        clean = self.backbone.latents(moments.detach(), self.noise(shape, f"{stream}/{streams.VAE}", step, positions))
        noise = self.noise(shape, f"{stream}/{streams.NOISE}", step, positions)
        if objective.offset_noise:
            offset = self.noise((shape[0], 1, 1), f"{stream}/{streams.OFFSET}", step, positions)
            noise = noise + objective.offset_noise * offset
        timesteps = draws.timesteps(len(self.backbone.schedule), self.seed, stream, step, positions, self.device)
        text = batch["text"] if "text" in batch else self.encode_text(batch["prompts"])
        schedule = self.backbone.schedule
        output = self.denoise(schedule.add_noise(clean, noise, timesteps), timesteps, text, batch)
        return objective(
            output,
            kind=self.backbone.prediction_type,
            schedule=schedule,
            clean=clean,
            noise=noise,
            timesteps=timesteps,
            mask=batch.get("mask"),
        )

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        draws.seed_dropout(self.seed, self.global_rank, int(batch["step"]), batch_idx, self.device)
        terms, loss = self._diffusion_terms(batch)
        extra = self.extra_losses(batch)
        terms |= extra
        loss = loss + sum(extra.values())
        first = batch_idx % self.trainer.accumulate_grad_batches == 0
        before = {} if first else self.step_metrics
        share = 1 / self.trainer.accumulate_grad_batches
        metrics = {"loss": loss, **(terms if len(terms) > 1 else {})}
        summed = {key: before.get(key, 0) + value.detach() * share for key, value in metrics.items()}
        self.step_metrics = {**before, **summed}
        return loss

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        self.executor.backward(loss, *args, **kwargs)

    def _diffusion_terms(self, batch: Batch) -> tuple[dict[str, Tensor], Tensor]:
        """The metrics of the diffusion loss, and what of it is minimised."""
        if self._vae_alone:
            self._moments(batch)  # no trained weight stands behind the diffusion loss
            return {}, torch.zeros((), device=self.device)
        per_sample = self.losses(batch)
        count = batch.get("instances", len(per_sample))
        terms = {"loss/diffusion": per_sample[:count].mean()}
        if count == len(per_sample):
            return terms, terms["loss/diffusion"]
        # Ruiz et al. 2022, eq. 2: the prior term is a mean of its own, so that its weight does not hang on B.
        terms["loss/prior"] = per_sample[count:].mean()
        return terms, terms["loss/diffusion"] + batch["prior_weight"] * terms["loss/prior"]

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        loss = self.losses(batch, streams.VALIDATION).mean()
        self.log("validation_loss", loss, batch_size=len(batch["prompts"]), sync_dist=True, on_epoch=True)

    # --- the optimizer

    def optimizer_groups(self) -> list[dict[str, Any]]:
        """A parameter group with its ``name`` for each component, and new tokens in one of their own."""
        words = {id(vectors) for vectors in self.backbone.learned}
        opened = [(name, p) for name, p in self.trainable() if id(p) not in words]
        groups = param_groups(opened, self.component_rates())
        if self.backbone.learned:
            # Decay would draw a word towards the vector that means nothing.
            own = {} if self.tokens_lr is None else {"lr": self.tokens_lr}
            groups.append({"name": "tokens", "params": self.backbone.learned, "weight_decay": 0.0, **own})
        return groups

    def configure_optimizers(self) -> Any:
        optimizer: Any = self.make_optimizer(self.optimizer_groups())
        if self.trainer.precision == "16-mixed":
            # A fused optimizer would take scaled gradients; then their norm could not be clipped before.
            set_takes_found_inf(optimizer, False)
        total = self.trainer.max_steps
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: self.lr_schedule(step, total))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the joint norm, keep it for the log, and have a step that is not finite skipped on the device."""
        scaled = self.trainer.precision == "16-mixed"
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        loss = self.step_metrics["loss"]
        self.step_metrics |= self.guard.clip(optimizer, parameters, gradient_clip_val, loss, scaled)

    # --- checkpoints: only what is trained

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        only_trained(checkpoint, [name for name, _ in self.trainable()])
        checkpoint["sdtune"] = {"backbone": self.source.hash(), "method": type(self).__name__}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another backbone or of other tensors, and load without the frozen ones."""
        check_same_backbone(checkpoint["sdtune"]["backbone"], self.source)
        complete(checkpoint, [name for name, _ in self.trainable()], self.state_dict())


def check_trainable(adapter: Adapter, data: ImageDataModule) -> None:
    """UserError where ``adapter`` cannot be trained on ``data``; loads no weights.

    Beside :meth:`Adapter.check_data`: components that would stay at random weights, files of another backbone, and new
    tokens that no prompt holds, which would learn nothing.
    """
    random = [part for part in adapter.source.from_scratch if part not in adapter.parts]
    if random:
        raise UserError(
            f"{random[0]} would stay at its random weights; only what method.parts of method=full names can begin from"
            " scratch",
            key="backbone.from_scratch",
        )
    for token in adapter.new_tokens:
        if token.weights is not None:
            check_file(token.weights, adapter.source.hash(), "new_tokens")
    adapter.check_data(data)
    check_mentioned(adapter.new_tokens, data.captions() if adapter.new_tokens else [])
