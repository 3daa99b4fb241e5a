"""A loaded Stable Diffusion model: encode, predict and decode, for training and sampling with every method."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from transformers import CLIPTokenizer

from sdtune.backbone.attention import set_attention
from sdtune.backbone.controlnet import AddedInputs, Conditioner, ControlNetKind
from sdtune.backbone.cpu_convolution import use_matmul_convolutions
from sdtune.backbone.families import Facts
from sdtune.backbone.latents import LatentCodec
from sdtune.backbone.new_tokens import ExtendedEmbedding, NewTokens
from sdtune.backbone.text import in_windows
from sdtune.conditioning import Conditioning
from sdtune.hardware.precision import HALVES
from sdtune.objective.path import path_from_config

_SHORT_SEQUENCE = 1024  # latent positions up to which unfused attention is used on a CPU


@dataclass(frozen=True)
class PromptLimit:
    """How much of a prompt is read.

    Attributes:
        encoder: the text encoder that reads most of it.
        tokens: number of tokens that it reads, with start and end token.
        special: number of start and end tokens.
    """

    encoder: str
    tokens: int
    special: int


Pairs = Mapping[str, tuple[Tensor, Tensor, float]]
"""LoRA pairs by module name in the denoiser: A [rank, in], B [out, rank] (4-D for convolutions), and their scale."""


class PairExecutor(Protocol):
    """Predicts with a denoiser that several runs share, and with the unmerged LoRA pairs of one run."""

    def predict_with_pairs(self, denoiser: Any, inputs: dict[str, Any], pairs: Pairs) -> Tensor:
        """Output of ``denoiser`` for ``inputs`` (:meth:`Backbone.denoiser_inputs`) with LoRA ``pairs`` applied."""


class Backbone(LatentCodec, ABC):
    """Tokenizers, text encoders, VAE, denoiser and probability path of one Stable Diffusion model.

    A family of models has a subclass, which knows how its text encoders and its denoiser are called.

    Args:
        tokenizers, encoders: by folder name in the pipeline, in the same order.
        vae, denoiser: the other models.
        scheduler_config: scheduler config of diffusers.
        facts: properties of the backbone.
        clip_skip: number of skipped last layers of the CLIP text encoders.
    """

    controlnets: ClassVar[ControlNetKind]
    """ControlNets of this family."""

    def __init__(
        self,
        tokenizers: Mapping[str, Any],
        encoders: Mapping[str, Any],
        vae: AutoencoderKL,
        denoiser: Any,
        scheduler_config: dict[str, Any],
        facts: Facts,
        clip_skip: int = 0,
    ) -> None:
        super().__init__()
        self.tokenizers = tuple(tokenizers.values())
        self.tokenizer: CLIPTokenizer = self.tokenizers[0]
        first, *others = encoders
        self.add_module(first, encoders[first])
        self.vae, self.denoiser = vae, denoiser
        for name in others:
            self.add_module(name, encoders[name])
        self._encoder_names = tuple(encoders)
        self.scheduler_config, self.facts, self.clip_skip = scheduler_config, facts, clip_skip
        self.path = path_from_config(scheduler_config)
        self.new_tokens: dict[str, NewTokens] = {}
        """New tokens that prompts may contain, by the name of the text encoder that has vectors of them."""
        self.waiting_states: Callable[[str], Tensor | None] = lambda prompt: None
        """Cached outputs of :meth:`encode_waiting`, [T, D] for a prompt, or None."""
        self.conditioners: tuple[Conditioner, ...] = ()
        """Modules beside the denoiser that are used for sampling, such as ControlNets; set by
        :meth:`sdtune.loaders.artifact.LoadedArtifact.applied`.
        """
        self.skipped_layers: tuple[int, ...] = ()
        """Numbers of the transformer's blocks that predictions skip, for skip-layer guidance."""
        self.pair_executor: PairExecutor | None = None
        """Applies this run's LoRA pairs to a denoiser that other runs share. If None, it is not shared, and LoRA pairs
        are merged into its weights for sampling.
        """
        self.sampling_pairs: Pairs | None = None
        """LoRA pairs that sampling applies without merging them, because other runs share the denoiser. Empty: sample
        without a LoRA. None: the denoiser is not shared. :class:`sdtune.loaders.lora.LoadedLoRA` sets it.
        """

    @property
    def encoders(self) -> dict[str, Any]:
        """Text encoders, by component name."""
        return {name: getattr(self, name) for name in self._encoder_names}

    @property
    def trainable_encoders(self) -> dict[str, Any]:
        """Text encoders that a method may train, by component name."""
        return self.encoders

    @property
    def waiting_encoders(self) -> dict[str, Any]:
        """Text encoders that are on the device only within :meth:`encoders_on_device`, by component name."""
        return {name: encoder for name, encoder in self.encoders.items() if name not in self.trainable_encoders}

    @property
    def waiting_are_frozen(self) -> bool:
        """Whether there are :attr:`waiting_encoders`, and none is trained: their outputs can be cached."""
        waiting = self.waiting_encoders.values()
        return bool(waiting) and not any(p.requires_grad for encoder in waiting for p in encoder.parameters())

    @property
    def prompt_limit(self) -> PromptLimit:
        """How much of a prompt is read."""
        return PromptLimit("text_encoder", self.facts.max_tokens, 2)

    @property
    @abstractmethod
    def text_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the text embeddings of one prompt, by field of :class:`Conditioning`."""

    @property
    def _token_count(self) -> int:
        """Number of CLIP tokens in all windows, including the start and end token of each window."""
        windows = self.facts.windows
        return windows * ((self.facts.max_tokens - 2) // windows + 2)

    @abstractmethod
    def frozen_prefixes(self, component: str) -> tuple[str, ...]:
        """Prefixes of the names of parameters in ``component`` that are never trained; empty for most components.

        The prediction does not depend on them, so they would get no gradient; or no file format has a place for them.
        """

    @property
    def device(self) -> torch.device:
        device: torch.device = next(self.denoiser.parameters()).device
        return device

    def prepare_for_device(self, device: torch.device, *others: Any) -> None:
        """Select the attention and convolution implementations for ``device``.

        Attention is fused (``sdpa``). On a CPU with at most 1024 latent positions it is unfused, because its backward
        is faster there; with more positions, unfused attention would need too much memory. Attention processors that a
        method has set are kept. On a CPU, the denoiser and ``others`` also use ``channels_last`` and
        :func:`use_matmul_convolutions`.

        Args:
            others: additional models with attention processors like the denoiser's.
        """
        positions = (self.facts.side // self.facts.factor) ** 2
        unfused = device.type == "cpu" and positions <= _SHORT_SEQUENCE
        for model in (self.denoiser, self.vae, *others):
            set_attention(model, sdpa=not unfused)
        for encoder in self.encoders.values():
            encoder.set_attn_implementation("eager" if unfused else "sdpa")
        if device.type == "cpu":
            for model in (self.denoiser, *others):
                model.to(memory_format=torch.channels_last)
                use_matmul_convolutions(model)

    def cast_frozen(self, precision: str) -> None:
        """Cast frozen weights, except the VAE's, to the half type of a mixed Lightning ``precision``.

        The VAE stays float32: it encodes each image only once, and some VAE encoders overflow in half precision.
        """
        half = HALVES.get(precision)
        for name, parameter in self.named_parameters() if half is not None else ():
            if not name.startswith("vae.") and not parameter.requires_grad and parameter.is_floating_point():
                parameter.data = parameter.data.to(half)

    # --- text

    def add_tokens(self, vectors: Mapping[str, Sequence[Tensor]]) -> None:
        """Add new tokens to the text encoders.

        Args:
            vectors: embedding vectors of each token, one tensor [N, D] per text encoder. With [0, D], the encoder reads
                the token as plain text.
        """
        for index, (name, encoder) in enumerate(self.encoders.items()):
            rows_of = {token: rows[index] for token, rows in vectors.items() if len(rows[index])}
            counts = self.new_tokens[name].vector_counts if name in self.new_tokens else {}
            assert not counts.keys() & rows_of.keys(), "each token is added once"
            if not rows_of:
                continue
            table = encoder.get_input_embeddings()
            rows = torch.cat(list(rows_of.values())).to(table.weight)
            if isinstance(table, ExtendedEmbedding):
                rows, table = torch.cat([table.vectors.data, rows]), table.table
            encoder.set_input_embeddings(ExtendedEmbedding(table, rows))
            known = NewTokens(table.num_embeddings, counts | {token: len(r) for token, r in rows_of.items()})
            self.new_tokens = {**self.new_tokens, name: known}

    @property
    def new_token_vectors(self) -> list[nn.Parameter]:
        """Embedding vectors of the new tokens: [N, D] for each text encoder that learned or loaded new tokens."""
        tables = [encoder.get_input_embeddings() for encoder in self.encoders.values()]
        return [table.vectors for table in tables if isinstance(table, ExtendedEmbedding)]

    def token_ids(self, prompts: Sequence[str], encoder: str = "text_encoder") -> list[list[int]]:
        """Token ids of each prompt for a text encoder, untruncated and without start and end token."""
        tokenizer = self.tokenizers[list(self.encoders).index(encoder)]
        if encoder in self.new_tokens:
            return [self.new_tokens[encoder].ids(tokenizer, prompt) for prompt in prompts]
        ids: list[list[int]] = tokenizer(list(prompts), add_special_tokens=False).input_ids
        return ids

    def tokenize(self, prompts: Sequence[str], encoder: str = "text_encoder") -> Tensor:
        """Token ids for a CLIP encoder, int64 [B, L], padded and truncated to one or more windows of its length."""
        tokenizer = self.tokenizers[list(self.encoders).index(encoder)]
        return in_windows(tokenizer, self.token_ids(prompts, encoder), self._token_count, self.facts.windows)

    def encoders_on_device(self) -> AbstractContextManager[None]:
        """Context manager that moves text encoders that wait in main memory to the device of the denoiser."""
        return nullcontext()

    def encode_waiting(self, prompts: Sequence[str]) -> Tensor:
        """Hidden states [B, T, D] that the :attr:`waiting_encoders` compute for ``prompts``, in their own dtype."""
        raise AssertionError("all text encoders of this family are on the device")

    @abstractmethod
    def encode_text(self, prompts: Sequence[str]) -> Conditioning:
        """Text embeddings of ``prompts``."""

    # --- denoising

    @abstractmethod
    def conditioning_arguments(self, conditioning: Conditioning, noisy: Tensor) -> dict[str, Any]:
        """Conditioning arguments of the denoiser and its ControlNets, besides noisy latents and timestep."""

    @abstractmethod
    def denoiser_inputs(
        self, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning, added: AddedInputs | None = None
    ) -> dict[str, Any]:
        """Keyword arguments of the denoiser for a prediction, the noisy latents first.

        Inputs are cast to the denoiser's dtype: a frozen half-precision denoiser does not accept float32 activations.
        """

    def predict(
        self, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning, added: AddedInputs | None = None
    ) -> Tensor:
        """Output of the denoiser for ``noisy`` [B, C, h, w] at ``timesteps`` [B] (or one).

        Args:
            added: inputs that modules beside the denoiser compute, such as the residuals of ControlNets.
        """
        inputs = self.denoiser_inputs(noisy, timesteps, conditioning, added)
        if self.sampling_pairs is not None:
            assert self.pair_executor is not None
            return self.pair_executor.predict_with_pairs(self.denoiser, inputs, self.sampling_pairs)
        out: Tensor = self.denoiser(**inputs).sample
        return out
