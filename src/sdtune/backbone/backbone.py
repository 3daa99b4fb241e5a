"""A loaded Stable Diffusion model: encode, predict and decode, for training and sampling with every method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Protocol

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from sdtune.backbone.attention import set_attention
from sdtune.backbone.controlnet import AddedInputs, Conditioner, cast_conditions
from sdtune.backbone.cpu_convolution import use_matmul_convolutions
from sdtune.backbone.families import Facts
from sdtune.backbone.new_tokens import ExtendedEmbedding, NewTokens
from sdtune.backbone.text import encoder_states, in_windows, unused_prefixes
from sdtune.conditioning import Conditioning
from sdtune.hardware.devices import send
from sdtune.hardware.precision import HALVES, autocast
from sdtune.objective.prediction import check_prediction_type
from sdtune.objective.schedule import NoiseSchedule

_SHORT_SEQUENCE = 1024  # latent positions up to which unfused attention is used on a CPU
DECODED_PIXELS = 2 * 512 * 512
"""Pixels per call of the VAE decoder; its largest activation then needs about 0.5 GB."""

TILE = 512
"""Side in pixels of the tiles for tiled decoding of large images."""


Pairs = Mapping[str, tuple[Tensor, Tensor, float]]
"""LoRA pairs by module name in the denoiser: A [rank, in], B [out, rank] (4-D for convolutions), and their scale."""


class PairExecutor(Protocol):
    """Predicts with a denoiser that several runs share, and with the unmerged LoRA pairs of one run."""

    def predict_with_pairs(self, denoiser: Any, inputs: dict[str, Any], pairs: Pairs) -> Tensor:
        """Output of ``denoiser`` for ``inputs`` (:meth:`Backbone.denoiser_inputs`) with LoRA ``pairs`` applied."""


class Backbone(nn.Module):
    """Tokenizer, text encoder, VAE, denoiser and noise schedule of one Stable Diffusion model.

    Images are float [B, 3, H, W] in [-1, 1]; latents are [B, C, H / factor, W / factor], scaled to about unit
    variance.
    """

    denoiser_folder: ClassVar[str] = "unet"
    """Folder of the denoiser in a pipeline, which also starts the names of its modules in LoRA files."""

    def __init__(
        self,
        tokenizer: CLIPTokenizer,
        text_encoder: CLIPTextModel,
        vae: AutoencoderKL,
        denoiser: Any,
        scheduler_config: dict[str, Any],
        facts: Facts,
        clip_skip: int = 0,
    ) -> None:
        super().__init__()
        self.tokenizer, self.text_encoder, self.vae, self.denoiser = tokenizer, text_encoder, vae, denoiser
        self.scheduler_config, self.facts, self.clip_skip = scheduler_config, facts, clip_skip
        self.schedule = NoiseSchedule.from_config(scheduler_config)
        self.prediction_type = check_prediction_type(facts.prediction_type)
        self.new_tokens: NewTokens | None = None
        """New tokens that prompts may contain; None if there are none."""
        self.decodes_in_tiles = False
        """Whether large images are decoded in tiles; see :meth:`decode_in_tiles`."""
        self.conditioners: tuple[Conditioner, ...] = ()
        """Modules beside the denoiser that are used for sampling, such as ControlNets; set by
        :meth:`sdtune.loaders.artifact.LoadedArtifact.applied`.
        """
        self.pair_executor: PairExecutor | None = None
        """Applies this run's LoRA pairs to a denoiser that other runs share. If None, it is not shared, and LoRA pairs
        are merged into its weights for sampling.
        """
        self.sampling_pairs: Pairs | None = None
        """LoRA pairs for sampling if the denoiser's weights are shared (empty: no LoRA), else None. Set by
        :class:`sdtune.loaders.lora.LoadedLoRA`.
        """

    @property
    def encoders(self) -> dict[str, Any]:
        """Text encoders, by component name."""
        return {"text_encoder": self.text_encoder}

    @property
    def tokenizers(self) -> tuple[CLIPTokenizer, ...]:
        """One tokenizer per text encoder."""
        return (self.tokenizer,)

    @property
    def text_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the text embeddings of one prompt, by field of :class:`Conditioning`."""
        return {"states": (self._token_count, int(self.denoiser.config.cross_attention_dim))}

    @property
    def _token_count(self) -> int:
        """Number of tokens in all windows, including the start and end token of each window."""
        windows = self.facts.windows
        return windows * ((self.facts.max_tokens - 2) // windows + 2)

    def unused_prefixes(self, component: str) -> tuple[str, ...]:
        """Name prefixes of parameters in text encoder ``component`` that the text embeddings do not depend on."""
        return unused_prefixes(self.encoders[component], self.clip_skip)

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

    # --- images

    def encode_images(self, images: Tensor) -> Tensor:
        """VAE posterior of ``images``: moments (mean, log-variance), float32 [B, 2C, h, w].

        Autocast is disabled: some VAE encoders overflow in half precision.
        """
        with autocast(images.device, "32-true"):
            moments: Tensor = self.vae.encode(images.to(self.vae.dtype)).latent_dist.parameters
        return moments.float()

    @staticmethod
    def _sample_posterior(moments: Tensor, noise: Tensor) -> Tensor:
        mean, log_variance = moments.chunk(2, dim=1)
        return mean + torch.exp(0.5 * log_variance.clamp(-30.0, 20.0)) * noise

    def reconstruct(self, moments: Tensor, noise: Tensor) -> Tensor:
        """Decode a sample of the VAE posterior to float32 [B, 3, H, W], about [-1, 1]; differentiable."""
        with autocast(moments.device, "32-true"):
            images: Tensor = self.vae.decode(self._sample_posterior(moments, noise).to(self.vae.dtype)).sample
        return images.float()

    def latents(self, moments: Tensor, noise: Tensor) -> Tensor:
        """Sample of the VAE posterior for standard normal ``noise`` [B, C, h, w], scaled for the denoiser."""
        sample = self._sample_posterior(moments, noise)
        shift: float = self.vae.config.shift_factor or 0.0
        scale: float = self.vae.config.scaling_factor
        return (sample - shift) * scale

    def decode_in_tiles(self, side: int = TILE) -> None:
        """Turn on tiled decoding for images larger than ``side`` pixels, to limit memory.

        Colors may differ slightly from untiled decoding, because the VAE normalizes each tile separately.
        """
        self.decodes_in_tiles = True
        self.vae.tile_sample_min_size, self.vae.tile_latent_min_size = side, side // self.facts.factor

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Decode scaled ``latents`` to images in [0, 1], float32 [B, 3, H, W]."""
        raw = latents.float() / self.vae.config.scaling_factor + (self.vae.config.shift_factor or 0.0)
        pixels = raw.shape[2] * raw.shape[3] * self.facts.factor**2
        # Call tiled_decode directly: enable_tiling would also tile the encoder and change the latents.
        tiles = self.decodes_in_tiles and max(raw.shape[2:]) > self.vae.tile_latent_min_size
        decode = self.vae.tiled_decode if tiles else self.vae.decode
        images: list[Tensor] = []
        with autocast(latents.device, "32-true"):
            for part in torch.split(raw.to(self.vae.dtype), max(1, DECODED_PIXELS // pixels)):
                images.append(decode(part).sample.float())
        return (torch.cat(images) / 2 + 0.5).clamp(0, 1)

    # --- text

    def add_tokens(self, vectors: Mapping[str, Sequence[Tensor]]) -> None:
        """Add new tokens with their embedding vectors [N, D] (one tensor per text encoder)."""
        first_id = len(self.tokenizer)
        assert all(len(tokenizer) == first_id for tokenizer in self.tokenizers)
        counts = {} if self.new_tokens is None else self.new_tokens.vector_counts
        assert not counts.keys() & vectors.keys(), "each token is added once"
        self.new_tokens = NewTokens(first_id, {**counts, **{token: len(rows[0]) for token, rows in vectors.items()}})
        for index, encoder in enumerate(self.encoders.values()):
            table = encoder.get_input_embeddings()
            rows = torch.cat([encoder_rows[index] for encoder_rows in vectors.values()]).to(table.weight)
            if isinstance(table, ExtendedEmbedding):
                rows, table = torch.cat([table.vectors.data, rows]), table.table
            encoder.set_input_embeddings(ExtendedEmbedding(table, rows, first_id))

    @property
    def new_token_vectors(self) -> list[nn.Parameter]:
        """Embedding vectors of all new tokens, [N, D] for each text encoder; empty if there are none."""
        tables = [encoder.get_input_embeddings() for encoder in self.encoders.values()]
        return [table.vectors for table in tables if isinstance(table, ExtendedEmbedding)]

    def token_ids(self, prompts: Sequence[str], tokenizer: CLIPTokenizer | None = None) -> list[list[int]]:
        """Token ids of each prompt, untruncated and without start and end token."""
        tokenizer = tokenizer or self.tokenizer
        if self.new_tokens is not None:
            return [self.new_tokens.ids(tokenizer, prompt) for prompt in prompts]
        ids: list[list[int]] = tokenizer(list(prompts), add_special_tokens=False).input_ids
        return ids

    def tokenize(self, prompts: Sequence[str], tokenizer: CLIPTokenizer | None = None) -> Tensor:
        """Token ids, int64 [B, L], padded and truncated to one or more windows of the text encoder's length."""
        tokenizer = tokenizer or self.tokenizer
        return in_windows(tokenizer, self.token_ids(prompts, tokenizer), self._token_count, self.facts.windows)

    def encode_text(self, prompts: Sequence[str]) -> Conditioning:
        """Text embeddings of SD 1.x and 2.x: hidden states after the final norm, respecting ``clip_skip``."""
        ids = send(self.tokenize(prompts), self.text_encoder.device)
        out = self.text_encoder(ids.view(len(ids) * self.facts.windows, -1), output_hidden_states=self.clip_skip > 0)
        states = encoder_states(self.text_encoder, out, self.clip_skip) if self.clip_skip else out.last_hidden_state
        return Conditioning(states.reshape(*ids.shape, -1))

    # --- denoising

    def conditions(self, conditioning: Conditioning, noisy: Tensor) -> dict[str, Any]:
        """Conditioning arguments of the denoiser and its ControlNets, besides noisy latents and timestep."""
        mask = {} if conditioning.mask is None else {"encoder_attention_mask": conditioning.mask}
        return {"encoder_hidden_states": conditioning.states, **mask}

    def denoiser_inputs(
        self, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning, added: AddedInputs | None = None
    ) -> dict[str, Any]:
        """Keyword arguments of the denoiser for a prediction; parameters as in :meth:`predict`.

        Inputs are cast to the denoiser's dtype: a frozen half-precision denoiser does not accept float32 activations.
        """
        dtype = self.denoiser.conv_in.weight.dtype
        inputs: dict[str, Any] = cast_conditions(self.conditions(conditioning, noisy), dtype)
        for name, value in (added or {}).items():
            inputs[name] = value.to(dtype) if isinstance(value, Tensor) else tuple(part.to(dtype) for part in value)
        return {"sample": noisy.to(dtype), "timestep": timesteps, **inputs}

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
