"""A loaded Stable Diffusion: encode, predict, decode; the same for every method, in training and in sampling."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from sdtune.backbone.controlnet import Net, Residuals, cast_conditions
from sdtune.backbone.cpu_convolution import as_products
from sdtune.backbone.families import Facts
from sdtune.backbone.new_tokens import ExtendedEmbedding, Words
from sdtune.backbone.text import hidden, unused, windowed
from sdtune.hardware.precision import HALVES, autocast
from sdtune.objective.prediction import check_prediction_type
from sdtune.objective.schedule import NoiseSchedule

_SHORT_SEQUENCE = 1024
DECODED_PIXELS = 2 * 512 * 512  # of one call of the VAE's decoder, whose widest activation then takes about 0.5 GB

TILE = 512
"""Side in pixels of the tiles that a large image is decoded in, where that is wanted."""


Pairs = Mapping[str, tuple[Tensor, Tensor, float]]
"""LoRA pairs A, B and their scale, by the name of their module in the UNet."""


class PairExecutor(Protocol):
    """Computes predictions of a UNet whose weights other runs use too, with LoRA pairs beside the weights."""

    def predict_with_pairs(self, unet: UNet2DConditionModel, inputs: dict[str, Any], pairs: Pairs) -> Tensor:
        """The output of ``unet`` for ``inputs`` (:meth:`Backbone.unet_inputs`) with ``pairs`` at its modules."""


class Backbone(nn.Module):
    """Tokenizer, text encoder, VAE, UNet and noise schedule of one Stable Diffusion.

    Images are float [B, 3, H, W] in [-1, 1]; latents are [B, C, H / factor, W / factor], scaled to about unit
    variance; text states are [B, L, D]; ``frame`` is float32 [B, 6]: height and width of the image as it was before
    it was scaled, top and left of its crop, height and width of the crop, in pixels (SDXL's size conditions).
    """

    def __init__(
        self,
        tokenizer: CLIPTokenizer,
        text_encoder: CLIPTextModel,
        vae: AutoencoderKL,
        unet: UNet2DConditionModel,
        scheduler_config: dict[str, Any],
        facts: Facts,
        clip_skip: int = 0,
    ) -> None:
        super().__init__()
        self.tokenizer, self.text_encoder, self.vae, self.unet = tokenizer, text_encoder, vae, unet
        self.scheduler_config, self.facts, self.clip_skip = scheduler_config, facts, clip_skip
        self.schedule = NoiseSchedule.from_config(scheduler_config)
        self.prediction_type = check_prediction_type(facts.prediction_type)
        self.words: Words | None = None
        """The new words that prompts may use, if there are any."""
        self.tiled = False
        """Whether large images are decoded in tiles: see :meth:`decode_in_tiles`."""
        self.nets: tuple[Net, ...] = ()
        """ControlNets that act when sampling; :func:`sdtune.loaders.controlnet.controlnets_applied` puts them there."""
        self.pair_executor: PairExecutor | None = None
        """Given where the UNet's weights are those of other runs too; LoRA pairs are merged into them where None."""
        self.drawing_pairs: Pairs | None = None
        """The pairs that act beside shared weights, none at strength 0; None where the weights themselves hold what is
        drawn: see :func:`sdtune.loaders.lora.adapters_applied`.
        """

    @property
    def encoders(self) -> dict[str, Any]:
        """Its text encoders, by component."""
        return {"text_encoder": self.text_encoder}

    @property
    def tokenizers(self) -> tuple[CLIPTokenizer, ...]:
        """One a text encoder."""
        return (self.tokenizer,)

    @property
    def text_shape(self) -> tuple[int, int]:
        """Of what :meth:`encode_text` makes of a prompt: (L, D)."""
        return self._tokens, int(self.unet.config.cross_attention_dim)

    @property
    def _tokens(self) -> int:
        """Of all windows together, each with a start and an end."""
        windows = self.facts.windows
        return windows * ((self.facts.max_tokens - 2) // windows + 2)

    def unused(self, component: str) -> tuple[str, ...]:
        """Starts of the names of what no state of text encoder ``component`` passes through: it gets no gradient."""
        return unused(self.encoders[component], self.clip_skip)

    @property
    def device(self) -> torch.device:
        device: torch.device = next(self.unet.parameters()).device
        return device

    def prepare_for_device(self, device: torch.device, *others: Any) -> None:
        """Fused attention; on a CPU plain products where latents are small: their backward is faster there.

        At long sequences the scores would fill the memory. Attention processors that a method has injected stay.

        Args:
            others: further models with attentions like the UNet's.
        """
        cells = (self.facts.side // self.facts.factor) ** 2
        plain = device.type == "cpu" and cells <= _SHORT_SEQUENCE
        for model in (self.unet, self.vae, *others):
            _set_default_processors(model, AttnProcessor if plain else AttnProcessor2_0)
        for encoder in self.encoders.values():
            encoder.set_attn_implementation("eager" if plain else "sdpa")
        if device.type == "cpu":
            for model in (self.unet, *others):
                model.to(memory_format=torch.channels_last)
                as_products(model)

    def cast_frozen(self, precision: str) -> None:
        """Under a mixed ``precision`` of Lightning's, frozen weights of all but the VAE go to its half type.

        The VAE stays float32: its encoder runs once an image, and some overflow in half precision.
        """
        half = HALVES.get(precision)
        for name, parameter in self.named_parameters() if half is not None else ():
            if not name.startswith("vae.") and not parameter.requires_grad:
                parameter.data = parameter.data.to(half)

    # --- images

    def encode_images(self, images: Tensor) -> Tensor:
        """The VAE's posterior for ``images``: moments (mean, log-variance) in float32, [B, 2C, h, w].

        Autocast is off: in half precision the encoders of some VAEs overflow.
        """
        with autocast(images.device, "32-true"):
            moments: Tensor = self.vae.encode(images.to(self.vae.dtype)).latent_dist.parameters
        return moments.float()

    @staticmethod
    def _drawn(moments: Tensor, noise: Tensor) -> Tensor:
        mean, log_variance = moments.chunk(2, dim=1)
        return mean + torch.exp(0.5 * log_variance.clamp(-30.0, 20.0)) * noise

    def reconstruct(self, moments: Tensor, noise: Tensor) -> Tensor:
        """What the VAE makes of a draw from its own posterior, float32 [B, 3, H, W], about [-1, 1]; with gradients."""
        with autocast(moments.device, "32-true"):
            images: Tensor = self.vae.decode(self._drawn(moments, noise).to(self.vae.dtype)).sample
        return images.float()

    def latents(self, moments: Tensor, noise: Tensor) -> Tensor:
        """A draw from the posterior with the given standard normal ``noise`` [B, C, h, w], scaled for the UNet."""
        drawn = self._drawn(moments, noise)
        shift: float = self.vae.config.shift_factor or 0.0
        scale: float = self.vae.config.scaling_factor
        return (drawn - shift) * scale

    def decode_in_tiles(self, side: int = TILE) -> None:
        """From now on images larger than ``side`` are decoded in blended tiles: their memory no longer grows.

        Their colours may differ a little from those of a whole decoding: the VAE's norms see a tile at a time.
        """
        self.tiled = True
        self.vae.tile_sample_min_size, self.vae.tile_latent_min_size = side, side // self.facts.factor

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Images in [0, 1], float32 [B, 3, H, W], from scaled ``latents``."""
        raw = latents.float() / self.vae.config.scaling_factor + (self.vae.config.shift_factor or 0.0)
        pixels = raw.shape[2] * raw.shape[3] * self.facts.factor**2
        # Asked for by name: the VAE's own switch would have it encode in tiles too, and latents would be others.
        tiles = self.tiled and max(raw.shape[2:]) > self.vae.tile_latent_min_size
        decode = self.vae.tiled_decode if tiles else self.vae.decode
        images: list[Tensor] = []
        with autocast(latents.device, "32-true"):
            for part in torch.split(raw.to(self.vae.dtype), max(1, DECODED_PIXELS // pixels)):
                images.append(decode(part).sample.float())
        return (torch.cat(images) / 2 + 0.5).clamp(0, 1)

    # --- text

    def add_tokens(self, vectors: Mapping[str, Sequence[Tensor]]) -> None:
        """Have prompts understand new words, each with its vectors [N, D], one a text encoder; once a backbone."""
        assert self.words is None, "words are added once"
        self.words = Words(self.tokenizers, {token: len(rows[0]) for token, rows in vectors.items()})
        for place, encoder in enumerate(self.encoders.values()):
            table = encoder.get_input_embeddings()
            rows = torch.cat([each[place] for each in vectors.values()]).to(table.weight)
            encoder.set_input_embeddings(ExtendedEmbedding(table, rows, self.words.first))

    @property
    def learned(self) -> list[nn.Parameter]:
        """The vectors of all new words, [N, D], of each text encoder; empty where there are none."""
        tables = [encoder.get_input_embeddings() for encoder in self.encoders.values()]
        return [table.vectors for table in tables if isinstance(table, ExtendedEmbedding)]

    def _expanded(self, prompts: Sequence[str]) -> list[str]:
        return [self.words.expanded(p) for p in prompts] if self.words is not None else list(prompts)

    def count_tokens(self, prompt: str) -> int:
        """Tokens of ``prompt`` with its start and end, untruncated; ``facts.max_tokens`` is the limit."""
        return len(self.tokenizer(self._expanded([prompt])[0]).input_ids)

    def tokenize(self, prompts: Sequence[str], tokenizer: CLIPTokenizer | None = None) -> Tensor:
        """Token ids, int64 [B, L], padded and truncated: one or more windows of the encoder's length."""
        return windowed(tokenizer or self.tokenizer, self._expanded(prompts), self._tokens, self.facts.windows)

    def encode_text(self, prompts: Sequence[str]) -> Tensor:
        """The text encoder's last states after its final norm, [B, L, D]: what SD 1.x and 2.x are conditioned on."""
        ids = self.tokenize(prompts).to(self.text_encoder.device)
        out = self.text_encoder(ids.view(len(ids) * self.facts.windows, -1), output_hidden_states=self.clip_skip > 0)
        states = hidden(self.text_encoder, out, self.clip_skip) if self.clip_skip else out.last_hidden_state
        return states.reshape(*ids.shape, -1)

    # --- denoising

    def conditions(self, text: Tensor, noisy: Tensor, frame: Tensor | None) -> dict[str, Any]:
        """What a UNet and its ControlNets take beside the noisy latents and the timestep."""
        return {"encoder_hidden_states": text}

    def unet_inputs(
        self,
        noisy: Tensor,
        timesteps: Tensor,
        text: Tensor,
        added: Residuals | None = None,
        frame: Tensor | None = None,
    ) -> dict[str, Any]:
        """The arguments with which the UNet is called for a prediction; arguments as of :meth:`predict`.

        Inputs take the UNet's dtype: a frozen half-precision UNet does not accept float32 activations.
        """
        dtype = self.unet.conv_in.weight.dtype
        inputs: dict[str, Any] = cast_conditions(self.conditions(text, noisy, frame), dtype)
        if added is not None:
            inputs["down_block_additional_residuals"] = tuple(r.to(dtype) for r in added.skips)
            inputs["mid_block_additional_residual"] = added.middle.to(dtype)
        return {"sample": noisy.to(dtype), "timestep": timesteps, **inputs}

    def predict(
        self,
        noisy: Tensor,
        timesteps: Tensor,
        text: Tensor,
        added: Residuals | None = None,
        frame: Tensor | None = None,
    ) -> Tensor:
        """The UNet's output for ``noisy`` [B, C, h, w] at ``timesteps`` [B] (or one) under ``text`` [B, L, D].

        Args:
            added: what ControlNets add.
            frame: float32 [B, 6]; that of a whole image of the latents' size if None.
        """
        inputs = self.unet_inputs(noisy, timesteps, text, added, frame)
        if self.drawing_pairs is not None:
            assert self.pair_executor is not None
            return self.pair_executor.predict_with_pairs(self.unet, inputs, self.drawing_pairs)
        out: Tensor = self.unet(**inputs).sample
        return out


def _set_default_processors(model: Any, kind: type) -> None:
    """Replace diffusers' default attention processors by ``kind``; keep all others, such as IP-Adapter's."""
    own = model.attn_processors
    defaults = (AttnProcessor, AttnProcessor2_0)
    model.set_attn_processor({name: kind() if type(each) in defaults else each for name, each in own.items()})
