"""A loaded Stable Diffusion: encode, predict, decode. The same for every method, in training and in sampling."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from sdtune.backbone.pretrained import Facts, Pretrained
from sdtune.backbone.residuals import Net, Residuals, residuals
from sdtune.backbone.tokens import ExtendedEmbedding, NewToken, Words, initial
from sdtune.objective.prediction import check
from sdtune.objective.schedule import NoiseSchedule

_SHORT_SEQUENCE = 1024
DECODED_PIXELS = 2 * 512 * 512  # of one call of the VAE's decoder, whose widest activation then takes about 0.5 GB

TILE = 512
"""Side in pixels of the tiles that a large picture is decoded in, where that is wanted."""

HALVES = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
"""The half type of each of Lightning's mixed precisions."""


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """As Lightning's ``precision`` has it; the meta device has none, and the CPU's stands for it (planning.kernels)."""
    kind = "cpu" if device.type == "meta" else device.type
    return torch.autocast(kind, HALVES.get(precision, torch.bfloat16), enabled=precision in HALVES)


class Backbone(nn.Module):
    """Tokenizer, text encoder, VAE, UNet and noise schedule of one Stable Diffusion.

    Pictures are float [B, 3, H, W] in [-1, 1]; latents are [B, C, H / factor, W / factor], scaled to about unit
    variance; text states are [B, L, D].
    """

    def __init__(
        self,
        tokenizer: CLIPTokenizer,
        text_encoder: CLIPTextModel,
        vae: AutoencoderKL,
        unet: UNet2DConditionModel,
        scheduler_config: dict[str, Any],
        facts: Facts,
    ) -> None:
        super().__init__()
        self.tokenizer, self.text_encoder, self.vae, self.unet = tokenizer, text_encoder, vae, unet
        self.scheduler_config, self.facts = scheduler_config, facts
        self.schedule = NoiseSchedule.from_config(scheduler_config)
        self.prediction_type = check(facts.prediction_type)
        self.words: Words | None = None
        """The new words that prompts may use, if there are any."""
        self.tiled = False
        """Whether large pictures are decoded in tiles: see :meth:`decode_in_tiles`."""
        self.nets: tuple[Net, ...] = ()
        """ControlNets that act when sampling; :func:`sdtune.controlnets.applied` puts them there."""

    @property
    def device(self) -> torch.device:
        device: torch.device = next(self.unet.parameters()).device
        return device

    def suit(self, device: torch.device, *beside: Any) -> None:
        """Fused attention; on a CPU plain products where latents are small: their backward is faster there.

        At long sequences the scores would fill the memory. ``beside`` are further models with attentions like the
        UNet's.
        """
        cells = (self.facts.side // self.facts.factor) ** 2
        plain = device.type == "cpu" and cells <= _SHORT_SEQUENCE
        for model in (self.unet, self.vae, *beside):
            model.set_attn_processor(AttnProcessor() if plain else AttnProcessor2_0())
        self.text_encoder.set_attn_implementation("eager" if plain else "sdpa")
        if device.type == "cpu":
            for model in (self.unet, *beside):
                model.to(memory_format=torch.channels_last)

    def halve_frozen(self, precision: str) -> None:
        """Under a mixed ``precision`` of Lightning's, frozen weights of all but the VAE go to its half type.

        The VAE stays float32: its encoder runs once a picture, and some overflow in half precision.
        """
        half = HALVES.get(precision)
        for name, parameter in self.named_parameters() if half is not None else ():
            if not name.startswith("vae.") and not parameter.requires_grad:
                parameter.data = parameter.data.to(half)

    # --- pictures

    def encode_images(self, pictures: Tensor) -> Tensor:
        """The VAE's posterior for ``pictures``: moments (mean, log-variance) in float32, [B, 2C, h, w].

        Autocast is off: in half precision the encoders of some VAEs overflow.
        """
        with autocast(pictures.device, "32-true"):
            moments: Tensor = self.vae.encode(pictures.to(self.vae.dtype)).latent_dist.parameters
        return moments.float()

    @staticmethod
    def _drawn(moments: Tensor, noise: Tensor) -> Tensor:
        mean, log_variance = moments.chunk(2, dim=1)
        return mean + torch.exp(0.5 * log_variance.clamp(-30.0, 20.0)) * noise

    def reconstruct(self, moments: Tensor, noise: Tensor) -> Tensor:
        """What the VAE makes of a draw from its own posterior, float32 [B, 3, H, W], about [-1, 1]; with gradients."""
        with autocast(moments.device, "32-true"):
            pictures: Tensor = self.vae.decode(self._drawn(moments, noise).to(self.vae.dtype)).sample
        return pictures.float()

    def latents(self, moments: Tensor, noise: Tensor) -> Tensor:
        """A draw from the posterior with the given standard normal ``noise`` [B, C, h, w], scaled for the UNet."""
        drawn = self._drawn(moments, noise)
        shift: float = self.vae.config.shift_factor or 0.0
        scale: float = self.vae.config.scaling_factor
        return (drawn - shift) * scale

    def decode_in_tiles(self, side: int = TILE) -> None:
        """From now on pictures larger than ``side`` are decoded in blended tiles: their memory no longer grows.

        Their colours may differ a little from those of a whole decoding: the VAE's norms see a tile at a time.
        """
        self.tiled = True
        self.vae.tile_sample_min_size, self.vae.tile_latent_min_size = side, side // self.facts.factor

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Pictures in [0, 1], float32 [B, 3, H, W], from scaled ``latents``."""
        raw = latents.float() / self.vae.config.scaling_factor + (self.vae.config.shift_factor or 0.0)
        pixels = raw.shape[2] * raw.shape[3] * self.facts.factor**2
        # Asked for by name: the VAE's own switch would have it encode in tiles too, and latents would be others.
        tiles = self.tiled and max(raw.shape[2:]) > self.vae.tile_latent_min_size
        decode = self.vae.tiled_decode if tiles else self.vae.decode
        pictures: list[Tensor] = []
        with autocast(latents.device, "32-true"):
            for part in torch.split(raw.to(self.vae.dtype), max(1, DECODED_PIXELS // pixels)):
                pictures.append(decode(part).sample.float())
        return (torch.cat(pictures) / 2 + 0.5).clamp(0, 1)

    # --- text

    def begin_tokens(self, tokens: Sequence[NewToken]) -> ExtendedEmbedding:
        """Add ``tokens`` at their initial values."""
        table = self.text_encoder.get_input_embeddings()
        return self.add_tokens({t.token: initial(self.tokenizer, table, t) for t in tokens})

    def add_tokens(self, vectors: Mapping[str, Tensor]) -> ExtendedEmbedding:
        """Have prompts understand new words, each with its vectors [N, D]; once a backbone."""
        assert self.words is None, "words are added once"
        table = self.text_encoder.get_input_embeddings()
        self.words = Words(self.tokenizer, {token: len(rows) for token, rows in vectors.items()})
        rows = torch.cat(list(vectors.values())).to(table.weight)
        embedding = ExtendedEmbedding(table, rows, self.words.first)
        self.text_encoder.set_input_embeddings(embedding)
        return embedding

    @property
    def learned(self) -> nn.Parameter | None:
        """The vectors of all new words, [N, D]."""
        embedding = self.text_encoder.get_input_embeddings()
        return embedding.vectors if isinstance(embedding, ExtendedEmbedding) else None

    def vectors(self) -> dict[str, Tensor]:
        """The vectors [N, D] of each new word, as they are now."""
        rows = self.learned
        if self.words is None or rows is None:
            return {}
        return {token: rows[list(self.words.rows(token))] for token in self.words.widths}

    @contextmanager
    def plain_vocabulary(self) -> Iterator[None]:
        """Within it, the text encoder is as others know it: without the new words."""
        embedding = self.text_encoder.get_input_embeddings()
        if isinstance(embedding, ExtendedEmbedding):
            self.text_encoder.set_input_embeddings(embedding.table)
        try:
            yield
        finally:
            self.text_encoder.set_input_embeddings(embedding)

    def _expanded(self, prompts: Sequence[str]) -> list[str]:
        return [self.words.expanded(p) for p in prompts] if self.words is not None else list(prompts)

    def count_tokens(self, prompt: str) -> int:
        """Tokens of ``prompt`` with its start and end, untruncated; ``facts.max_tokens`` is the limit."""
        return len(self.tokenizer(self._expanded([prompt])[0]).input_ids)

    def tokenize(self, prompts: Sequence[str]) -> Tensor:
        """Token ids, int64 [B, L], padded and truncated to the encoder's length."""
        ids: Tensor = self.tokenizer(
            self._expanded(prompts),
            padding="max_length",
            truncation=True,
            max_length=self.facts.max_tokens,
            return_tensors="pt",
        ).input_ids
        return ids

    def encode_text(self, prompts: Sequence[str]) -> Tensor:
        """The text encoder's last states after its final norm, [B, L, D]: what SD 1.x and 2.x are conditioned on."""
        ids = self.tokenize(prompts).to(self.text_encoder.device)
        states: Tensor = self.text_encoder(ids).last_hidden_state
        return states

    # --- denoising

    def predict(self, noisy: Tensor, timesteps: Tensor, text: Tensor, added: Residuals | None = None) -> Tensor:
        """The UNet's output for ``noisy`` [B, C, h, w] at ``timesteps`` [B] (or one) under ``text`` [B, L, D].

        Inputs take the UNet's dtype: a frozen half-precision UNet does not accept float32 activations.
        """
        dtype = self.unet.conv_in.weight.dtype
        control: dict[str, Any] = {}
        if added is not None:
            control["down_block_additional_residuals"] = tuple(r.to(dtype) for r in added.skips)
            control["mid_block_additional_residual"] = added.middle.to(dtype)
        out: Tensor = self.unet(noisy.to(dtype), timesteps, encoder_hidden_states=text.to(dtype), **control).sample
        return out

    def predict_under(self, noisy: Tensor, timesteps: Tensor, text: Tensor, maps: Sequence[Tensor]) -> Tensor:
        """:meth:`predict` under ``nets``, one map (float32 [B, 3, H, W] in [0, 1]) each; plainly without either."""
        pairs = zip(self.nets, maps, strict=True) if self.nets and maps else ()
        # At strength 0 a net is not asked: the base then costs what it costs.
        added = [residuals(n.model, noisy, timesteps, text, own, n.strength) for n, own in pairs if n.strength]
        return self.predict(noisy, timesteps, text, reduce(Residuals.__add__, added) if added else None)


def load(source: Pretrained, seed: int) -> Backbone:
    """Read ``source``: float32, eval mode, frozen."""
    facts = source.facts
    folder = source.folder()

    def component(name: str, kind: Any) -> Any:
        if name in source.from_scratch:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                return from_config(name, folder, kind)
        return kind.from_pretrained(
            folder / name, torch_dtype=torch.float32, use_safetensors=True, local_files_only=True
        )

    backbone = Backbone(
        tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True),
        text_encoder=component("text_encoder", CLIPTextModel),
        vae=component("vae", AutoencoderKL),
        unet=component("unet", UNet2DConditionModel),
        scheduler_config=source.scheduler(),
        facts=facts,
    )
    backbone.requires_grad_(False)
    return backbone.eval()


def from_config(name: str, folder: Path, kind: Any) -> Any:
    """Component ``name`` with weights drawn anew."""
    if name.startswith("text_encoder"):
        return kind(CLIPTextConfig.from_pretrained(folder / name))
    return kind.from_config(kind.load_config(folder / name))
