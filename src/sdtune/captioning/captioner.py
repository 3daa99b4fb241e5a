"""Captions from image-text-to-text models of transformers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import Annotated, Any

import torch
from annotated_types import Ge
from PIL import Image
from torch import Tensor
from transformers import AutoModelForImageTextToText

from sdtune.captioning.models import load_transformers_model
from sdtune.errors import UserError
from sdtune.hardware.precision import autocast, generation_dtype

DEFAULT_INSTRUCTION = "Describe this image in one sentence."
"""Instruction for a chat model if there is no prompt."""


@dataclass(frozen=True)
class CaptionSettings:
    """Settings of a captioner.

    Args:
        prompt: question or instruction; None: none, and :data:`DEFAULT_INSTRUCTION` for chat models. BLIP continues its
            prompt, which is therefore part of the caption.
        max_new_tokens: maximum length of the generated text, in tokens.
    """

    prompt: str | None = None
    max_new_tokens: Annotated[int, Ge(1)] = 75


class Captioner:
    """BLIP (Li et al. 2022), BLIP-2, LLaVA, Qwen-VL or another image-text-to-text model of transformers.

    Decoding is greedy, so the captions are deterministic. Models with a chat template get the prompt and the image as
    one message of the user.

    Args:
        folder: folder of the model.
        precision: Lightning's precision; on a GPU, the weights have its half precision.

    Raises:
        UserError: the model cannot be loaded.
    """

    def __init__(self, folder: Path, settings: CaptionSettings, device: torch.device, precision: str) -> None:
        on_cpu = device.type == "cpu"
        self._settings, self._folder, self._device = settings, folder, device
        self._dtype = (None if on_cpu else generation_dtype(device, precision)) or torch.float32
        self._precision = precision if on_cpu else "32-true"
        self._processor, self._model = load_transformers_model(AutoModelForImageTextToText, folder, device, self._dtype)
        self._processor.tokenizer.padding_side = "left"  # decoder-only models continue the last token
        if self._processor.tokenizer.pad_token is None:
            self._processor.tokenizer.pad_token = self._processor.tokenizer.eos_token
        self._is_chat = getattr(self._processor, "chat_template", None) is not None

    @torch.no_grad()
    def __call__(self, images: Sequence[Image.Image]) -> list[str]:
        """One caption per image, on one line each; the images are in mode RGB.

        Raises:
            UserError: the model needs a prompt.
        """
        inputs = {key: self._on_device(value) for key, value in self._inputs(list(images)).items()}
        with autocast(self._device, self._precision):
            tokens = self._model.generate(
                **inputs, max_new_tokens=self._settings.max_new_tokens, do_sample=False, num_beams=1
            )
        if self._model.config.model_type != "blip" and "input_ids" in inputs:
            tokens = _without_prompt(tokens, inputs["input_ids"])
        texts = self._processor.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        return [" ".join(text.split()) for text in texts]

    def _on_device(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.to(self._device, self._dtype if value.is_floating_point() else None)

    def _inputs(self, images: list[Image.Image]) -> Any:
        """Inputs of the model: pixels and, depending on the model, tokens of the prompt."""
        prompt = self._settings.prompt
        if self._is_chat:
            text = {"type": "text", "text": prompt or DEFAULT_INSTRUCTION}
            chats = [[{"role": "user", "content": [{"type": "image", "image": image}, text]}] for image in images]
            return self._processor.apply_chat_template(
                chats,
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                processor_kwargs={"padding": True},
            )
        if prompt is not None:
            return self._processor(images=images, text=[prompt] * len(images), padding=True, return_tensors="pt")
        try:
            return self._processor(images=images, return_tensors="pt")
        except (ValueError, TypeError) as error:
            reason = shorten(str(error), 100, placeholder=" ...")
            raise UserError(
                f"{self._folder} needs a prompt ({reason})", key="prompt", remedy="set prompt=TEXT"
            ) from error


def _without_prompt(tokens: Tensor, prompt: Tensor) -> Tensor:
    """Generated ``tokens`` [N, L] without the tokens of the ``prompt`` [N, P], which decoder-only models repeat."""
    length = prompt.shape[1]
    is_repeated = tokens.shape[1] >= length and torch.equal(tokens[:, :length], prompt)
    return tokens[:, length:] if is_repeated else tokens
