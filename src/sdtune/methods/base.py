"""What every method shares: the loop from batch to loss, the optimizer, and what a checkpoint holds."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, TypedDict

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from sdtune.backbone import Pretrained
from sdtune.backbone.backbone import Backbone
from sdtune.data.pictures import VALIDATION_RUNGS, Batch, Encoders, PictureData
from sdtune.lr_schedule import Constant, LRSchedule
from sdtune.methods.guard import skip_if_not_finite
from sdtune.objective import Objective
from sdtune.paths import cache_folder
from sdtune.randomness import generator


class Average(Protocol):
    """An average of the trained weights, which can stand in for them."""

    def swapped(self, module: nn.Module) -> AbstractContextManager[None]: ...


MakeOptimizer = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]


class Common(TypedDict, total=False):
    """What every method is given beside its own settings."""

    backbone: Pretrained
    objective: Objective
    optimizer: MakeOptimizer
    lr_schedule: LRSchedule
    seed: int


class Adapter(pl.LightningModule, ABC):
    """One way to fine-tune, over a frozen backbone.

    A subclass says which parts it opens or inserts (:meth:`inject`) and what it leaves behind (:meth:`artifact`), and
    where it must, how it denoises. It overrides nothing else.
    """

    def __init__(
        self,
        *,
        backbone: Pretrained | None = None,
        objective: Objective | None = None,
        optimizer: MakeOptimizer | None = None,
        lr_schedule: LRSchedule | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.source = backbone or Pretrained()
        self.objective = objective or Objective()
        self.make_optimizer: MakeOptimizer = optimizer or (
            lambda groups: torch.optim.AdamW(groups, lr=1e-4, fused=True)
        )
        self.lr_schedule = lr_schedule or Constant(warmup_steps=100)
        self.seed = seed
        self.backbone: Backbone
        self.step_figures: dict[str, Tensor] = {}
        """Figures of the optimizer step just made, still on the device: losses, gradient norm, finiteness."""
        self.flushed: dict[str, float] = {}
        """The last figures brought over from the device, for the progress bar."""
        self.average: Average | None = None
        """Set by a callback that keeps an average of the trained weights."""

    # --- what a method says

    @abstractmethod
    def inject(self) -> None:
        """Open or insert the trainable parts; everything is frozen before."""

    @abstractmethod
    def artifact(self, folder: Path, name: str) -> None:
        """Write what other programs load, from the weights as they are now."""

    def snapshot(self, folder: Path, stem: str) -> None:
        """Write an intermediate artifact; by default what :meth:`artifact` writes, under ``stem``."""
        self.artifact(folder, stem)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Optimizer groups with a ``name`` each; by default one."""
        return [{"name": "all", "params": [p for _, p in self.trainable()]}]

    def check_data(self, data: PictureData) -> None:
        """ValueError for data that this method cannot learn from; called before weights are loaded."""

    def denoise(self, noisy: Tensor, timesteps: Tensor, text: Tensor, batch: Batch) -> Tensor:
        """The UNet's output [B, C, h, w]; sampling calls it too, so a preview cannot drift from training."""
        return self.backbone.predict(noisy, timesteps, text)

    def extra_losses(self, batch: Batch) -> dict[str, Tensor]:
        """Further terms of the loss, each a scalar."""
        return {}

    # --- the model

    def trainable(self) -> list[tuple[str, nn.Parameter]]:
        """The open parameters with their names, in the module's order."""
        return [(name, p) for name, p in self.named_parameters() if p.requires_grad]

    def configure_model(self) -> None:
        """Load the backbone, freeze it, inject; Lightning may call this more than once."""
        if hasattr(self, "backbone"):
            return
        self.backbone = self.source.load(self.seed)
        self.inject()
        assert self.trainable(), "inject() opened nothing"

    def final_weights(self) -> AbstractContextManager[None]:
        """Within it, the weights are those that a run leaves behind: the average where one is kept."""
        return self.average.swapped(self) if self.average is not None else nullcontext()

    def open(self, component: str) -> bool:
        """Whether any parameter of the backbone's ``component`` is trained."""
        return any(p.requires_grad for p in getattr(self.backbone, component).parameters())

    def on_fit_start(self) -> None:
        beside = [model for model in self.children() if hasattr(model, "set_attn_processor")]
        self.backbone.suit(self.device, *beside)
        self.backbone.schedule.to(self.device)
        self._halve_frozen()
        data = getattr(self.trainer, "datamodule", None)
        if data is not None and hasattr(data, "prepare"):
            self.check_data(data)
            data.open(self.source.facts.side, self.source.facts.factor)
            data.prepare(self.encoders())
            self.trainer.strategy.barrier("caches")
            if self.trainer.num_nodes > 1:
                # Nodes that share no cache folder lack the others' entries; where they do, nothing is missing.
                data.prepare(replace(self.encoders(), rank=0, processes=1))

    def on_train_start(self) -> None:
        # A checkpoint brings the rate that followed from its own trainer.max_steps; an extended run has another.
        for config in self.trainer.lr_scheduler_configs:
            schedule = config.scheduler
            assert isinstance(schedule, torch.optim.lr_scheduler.LambdaLR)
            for group, rate, factor in zip(
                schedule.optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas, strict=True
            ):
                group["lr"] = rate * factor(schedule.last_epoch)

    def _halve_frozen(self) -> None:
        """Under bf16-mixed, frozen weights of UNet and text encoder go to bfloat16; trained ones stay float32.

        The VAE stays float32: its encoder runs once a picture, and some overflow in half precision.
        """
        if self.trainer.precision != "bf16-mixed":
            return
        for component in (self.backbone.unet, self.backbone.text_encoder):
            for parameter in component.parameters():
                if not parameter.requires_grad:
                    parameter.data = parameter.data.to(torch.bfloat16)

    def encoders(self) -> Encoders:
        """The frozen parts that data may cache; None where a part is trained."""

        def images(pictures: Tensor) -> Tensor:
            return self.backbone.encode_images(pictures.to(self.device))

        def text(prompts: Sequence[str]) -> Tensor:
            return self._encode_text(prompts).float()

        frozen_vae, frozen_text = not self.open("vae"), not self.open("text_encoder")
        precision = str(self.trainer.precision)
        return Encoders(
            images=images if frozen_vae else None,
            images_hash=self.source.encoder_key("vae", "32-true") if frozen_vae else "",
            text=text if frozen_text else None,
            # The text encoder's precision follows the run's, so states of one are not those of another.
            text_hash=self.source.encoder_key("text_encoder", precision) if frozen_text else "",
            cache=cache_folder(),
            rank=self.trainer.global_rank,
            processes=self.trainer.world_size,
        )

    def _encode_text(self, prompts: Sequence[str]) -> Tensor:
        """Text states; frozen half-precision weights need autocast also outside a training step."""
        with self._autocast():
            return self.backbone.encode_text(prompts)

    def _autocast(self) -> torch.autocast:
        half = self._trainer is not None and self.trainer.precision == "bf16-mixed"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=half)

    # --- a step

    def _noise(self, shape: Sequence[int], stream: str, step: int, positions: Iterable[int]) -> Tensor:
        """Standard normal [len(positions), *shape], each sample a function of its place alone."""
        # Validation looks at the same noise in every run, so that curves compare across seeds too.
        seed = self.seed if stream.startswith("train/") else 0
        rows = [generator(seed, stream, step, p).standard_normal(shape, dtype=np.float32) for p in positions]
        drawn = torch.from_numpy(np.stack(rows))
        # Only a copy from pinned memory does not wait.
        drawn = drawn.pin_memory() if self.device.type == "cuda" else drawn
        return drawn.to(self.device, non_blocking=True)

    def _timesteps(self, stream: str, step: int, positions: Sequence[int]) -> Tensor:
        count = len(self.backbone.schedule)
        if stream == "validation":
            rungs = [int((p % VALIDATION_RUNGS + 0.5) * count / VALIDATION_RUNGS) for p in positions]
        else:
            rungs = [int(generator(self.seed, f"{stream}/timestep", step, p).integers(count)) for p in positions]
        return torch.tensor(rungs).to(self.device, non_blocking=True)

    def losses(self, batch: Batch, stream: str = "train") -> Tensor:
        """The diffusion loss of each sample, float32 [B]; ``stream``, train or validation, names the draws."""
        step, positions = batch["step"], batch["positions"]
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.open("vae")):
            moments = batch["moments"] if "moments" in batch else self.backbone.encode_images(batch["pixels"])
            shape = (moments.shape[1] // 2, *moments.shape[2:])
            clean = self.backbone.latents(moments, self._noise(shape, f"{stream}/vae", step, positions)).detach()
        noise = self._noise(shape, f"{stream}/noise", step, positions)
        timesteps = self._timesteps(stream, step, positions)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.open("text_encoder")):
            text = batch["text"] if "text" in batch else self._encode_text(batch["prompts"])
        schedule = self.backbone.schedule
        output = self.denoise(schedule.add_noise(clean, noise, timesteps), timesteps, text, batch)
        return self.objective(
            output,
            kind=self.backbone.prediction_type,
            schedule=schedule,
            clean=clean,
            noise=noise,
            timesteps=timesteps,
        )

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        # Dropout inside a model uses the global generator; seeding it by place makes a resumed run exact.
        place = generator(self.seed, f"dropout/{self.global_rank}", int(batch["step"]), batch_idx)
        torch.manual_seed(int(place.integers(2**31)))
        per_sample = self.losses(batch)
        terms = {"loss/diffusion": per_sample.mean(), **self.extra_losses(batch)}
        loss: Tensor = torch.stack(list(terms.values())).sum()
        first = batch_idx % self.trainer.accumulate_grad_batches == 0
        before = {} if first else self.step_figures
        share = 1 / self.trainer.accumulate_grad_batches
        figures = {"loss": loss, **(terms if len(terms) > 1 else {})}
        self.step_figures = {
            **before,
            **{key: before.get(key, 0) + value.detach() * share for key, value in figures.items()},
        }
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.log(
            "validation_loss",
            self.losses(batch, "validation").mean(),
            batch_size=len(batch["prompts"]),
            sync_dist=True,
            on_epoch=True,
        )

    # --- the optimizer

    def configure_optimizers(self) -> Any:
        optimizer = self.make_optimizer(self.parameter_groups())
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
        parameters = [p for _, p in self.trainable()]
        norm = nn.utils.clip_grad_norm_(parameters, gradient_clip_val or float("inf"))
        self.step_figures["grad_norm"] = norm.detach()
        self.step_figures["finite"] = skip_if_not_finite(optimizer, parameters, norm)

    # --- checkpoints: only what is trained

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        names = {name for name, _ in self.trainable()}
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in names}
        checkpoint["sdtune"] = {"backbone": self.source.hash(), "method": type(self).__name__}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another backbone or of other tensors, and load without the frozen ones."""
        theirs = checkpoint["sdtune"]["backbone"]
        if theirs != self.source.hash():
            raise ValueError(
                f"resume: the checkpoint was trained on another backbone ({theirs[:12]}) than"
                f" {self.source.path} ({self.source.hash()[:12]}); name the one that it was trained on"
            )
        ours, found = {name for name, _ in self.trainable()}, set(checkpoint["state_dict"])
        if ours != found:
            odd = sorted(ours ^ found)
            raise ValueError(f"resume: {len(odd)} trained tensors do not match the checkpoint's, first {odd[0]}")
        # A strict load wants every frozen tensor; the names have just been compared, so hand those in as they are.
        checkpoint["state_dict"] = {**self.state_dict(), **checkpoint["state_dict"]}
