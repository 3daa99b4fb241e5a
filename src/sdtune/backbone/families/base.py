"""What all model families share: their description, and the properties of a backbone."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from sdtune.errors import UserError, check_multiple
from sdtune.formats.kohya_lora import ModelNames, ModelSpecPrediction
from sdtune.formats.kohya_names import KohyaTable
from sdtune.formats.original import ComponentLayout, FileLayout
from sdtune.formats.original.names import modern_vae_key, vae_entries
from sdtune.objective.prediction import PredictionType

FamilyName = Literal["sd1", "sd2", "sdxl", "sd3_medium", "sd35_medium", "sd35_large"]
"""Values of ``backbone.family``."""

Component = Literal["denoiser", "vae", "text_encoder"]
"""Components that a method may train. ``text_encoder`` stands for all CLIP text encoders of a model."""

LoRATarget = Literal["cross_attention", "self_attention", "joint_attention", "feed_forward", "convolutions"]
"""Kinds of layers of a denoiser that a LoRA can target."""

LoRAProjection = Literal["q", "k", "v", "out"]
"""Linear layers of an attention layer."""

Quantization = Literal["fp8", "int8", "nf4"]
"""Formats of quantized weights (:mod:`sdtune.backbone.quantization`)."""


STATED_PREDICTION = "_prediction_type_of_file"
"""Key in the scheduler config of a converted single file that states its own prediction type; diffusers ignores keys
that begin with an underscore."""

T5 = "text_encoder_3"
"""Folder of T5 in a pipeline."""

VAE = ComponentLayout(
    "first_stage_model.",
    vae_entries,
    usual_name=modern_vae_key,
    is_unused=lambda key, config: key.startswith("loss."),
)
"""Layout of the VAE in single files. Some files use the tensor names of diffusers; they are read too."""

_SPEC_PREDICTIONS: dict[str, ModelSpecPrediction] = {"v_prediction": "v", "flow_prediction": "flow"}


def model_spec_prediction(prediction_type: str) -> ModelSpecPrediction:
    """Convert a ``prediction_type`` of diffusers to the word that ModelSpec's metadata uses."""
    return _SPEC_PREDICTIONS.get(prediction_type, "epsilon")


@dataclass(frozen=True)
class Family(ABC):
    """A model family: names, default settings, and the formats of its files.

    Attributes:
        name: name in configs and records.
        title: display name.
        option: ``backbone`` option of the command line.
        guidance: default guidance scale, as in ``conf/backbone``.
        configs: folder of the included configs in ``backbone/configs``.
        denoiser: folder of the denoiser in a pipeline.
        pads: text encoders with the padding token of their tokenizers; None if sdtune does not include the tokenizer.
        layout: layout of single files.
        architecture: architecture in ModelSpec's metadata of a full model.
        blocks: prefixes of the names of the denoiser's modules in its blocks, without its first and last layers.
        lora_targets: kinds of layers of the denoiser that a LoRA can target.
        default_targets: those that a LoRA targets by default.
    """

    name: FamilyName
    title: str
    option: str
    guidance: float
    configs: str
    denoiser: str
    pads: Mapping[str, str | None]
    layout: FileLayout
    architecture: str
    blocks: tuple[str, ...]
    lora_targets: tuple[LoRATarget, ...]
    default_targets: tuple[LoRATarget, ...]

    @property
    def text_encoders(self) -> tuple[str, ...]:
        """Folders of the text encoders."""
        return tuple(self.pads)

    @property
    def has_t5(self) -> bool:
        """Whether the denoiser is conditioned on T5; its CLIP text encoders then read one window of a prompt."""
        return T5 in self.pads

    @property
    def components(self) -> tuple[str, ...]:
        """Folders of the models, in the order of :attr:`layout`."""
        return tuple(self.layout.components)

    @abstractmethod
    def model_classes(self) -> dict[str, Any]:
        """Class of each component in diffusers or transformers."""

    @abstractmethod
    def is_in(self, shapes: Mapping[str, Sequence[int]]) -> bool:
        """Whether a single file with these tensors (by original name) contains a model of this family."""

    def usual_names(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``tensors`` of a single file with the names in :attr:`layout`, for files that deviate from it."""
        return dict(tensors)

    @abstractmethod
    def lora_layer(self, name: str) -> tuple[LoRATarget, LoRAProjection | None] | None:
        """Kind of the denoiser's layer ``name`` and, in attention, its projection; None if no LoRA can target it."""

    @abstractmethod
    def lora_names(self, prediction_type: str) -> ModelNames:
        """Names of the model in the metadata of its LoRA files; ``prediction_type`` is one of diffusers."""

    @abstractmethod
    def kohya_table(self, modules: Collection[str], denoiser: Mapping[str, Any]) -> KohyaTable:
        """Names of modules in kohya files.

        Args:
            modules: canonical paths with component.
            denoiser: config of the denoiser.
        """


@dataclass(frozen=True)
class Facts:
    """Properties of a backbone that are known before its weights are read.

    Attributes:
        side: native resolution of the denoiser, in pixels.
        factor: downscaling factor of the VAE: pixels per latent cell in each direction.
        patch: latent cells per patch of the denoiser in each direction; 1 for a UNet.
        max_tokens: maximum number of CLIP tokens of a prompt, including the start and end token.
        blocks: number of blocks of a transformer; 0 for a UNet.
        largest_side: longest side in pixels that a transformer's position table allows; None for a UNet.
        t5_tokens: number of T5 tokens of a prompt; 0 if the denoiser is not conditioned on T5.
        windows: number of windows of the text encoder that a prompt may fill (75 tokens each for CLIP).
        scheduler: diffusers class of the scheduler config; empty if the config names none.
        train_timesteps: number of timesteps of the noise schedule.
        min_steps: minimum number of sampling steps with PNDM: 4 for its Runge-Kutta steps (Liu et al. 2022), 1 with
            ``skip_prk_steps`` or with zero terminal SNR, for which DDIM is used instead.
    """

    side: int
    factor: int
    latent_channels: int
    prediction_type: PredictionType
    max_tokens: int
    family: Family = field(repr=False)
    windows: int = 1
    scheduler: str = "DDIMScheduler"
    train_timesteps: int = 1000
    min_steps: int = 1
    patch: int = 1
    blocks: int = 0
    largest_side: int | None = None
    t5_tokens: int = 0

    def room_of(self, encoder: str) -> tuple[int, str | None]:
        """Number of tokens that ``encoder`` reads of a prompt, without start and end token.

        Also returns the config key that raises this number; None if there is none.
        """
        if encoder == T5:
            return self.t5_tokens - 1, "backbone.t5_tokens"
        return self.max_tokens - 2, None if self.family.has_t5 else "backbone.max_tokens"

    def check_side(self, side: int, key: str) -> None:
        """Raise UserError if the model cannot use an image with this ``side`` in pixels; ``key`` sets it."""
        check_multiple(side, self.factor * self.patch, key)
        if self.largest_side is not None and side > self.largest_side:
            raise UserError(f"{side} pixels, but the position table ends at {self.largest_side}", key=key,
                            remedy=f"set at most {self.largest_side}")  # fmt: skip
