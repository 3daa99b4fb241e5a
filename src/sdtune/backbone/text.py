"""Arrange token ids in windows, and select the hidden states of a text encoder that condition the UNet."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPTokenizer


def in_windows(tokenizer: CLIPTokenizer, prompts: Sequence[Sequence[int]], length: int, windows: int) -> Tensor:
    """Token ids, int64 [B, ``length``], in ``windows`` windows of equal length, each with a start and end token.

    Longer prompts are truncated. A1111 and ComfyUI read long prompts in the same way; kohya's trainer drops the start
    and end tokens between windows.

    Args:
        tokenizer: for the ids of the start, end and padding tokens.
        prompts: token ids of each prompt, without start and end token.
        length: total number of tokens over all windows, including the start and end token of each window.
    """
    window = length // windows
    start, end, pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    rows = []
    for tokens in prompts:
        row: list[int] = []
        for first in range(0, windows * (window - 2), window - 2):
            part = [start, *tokens[first : first + window - 2], end]
            row += part + [pad] * (window - len(part))
        rows.append(row)
    return torch.tensor(rows, dtype=torch.long)


def encoder_states(encoder: Any, out: Any, skip: int, norm: bool = True) -> Tensor:
    """Hidden states [B, L, D] without the last ``skip`` layers, after the final norm if ``norm``.

    ``skip`` is counted as ``clip_skip`` in diffusers. SD 1.x and 2.x apply the final norm to them, SDXL does not.
    """
    states: Tensor = out.hidden_states[-(skip + 1)]
    return _text_transformer(encoder).final_layer_norm(states) if norm else states


def pooled_embedding(encoder: Any, out: Any, ids: Tensor, tokenizer: CLIPTokenizer) -> Tensor:
    """Projected state [B, P] of the first end token.

    With ``eos_token_id: 2`` in the config, transformers would pool at the largest id, which is a new token if the
    prompt contains one.
    """
    ends = (ids == tokenizer.eos_token_id).int().argmax(-1)
    last = out.last_hidden_state[torch.arange(len(ids), device=ends.device), ends]
    projected: Tensor = encoder.text_projection(last)
    return projected


def unused_prefixes(encoder: Any, skip: int, norm: bool = True) -> tuple[str, ...]:
    """Name prefixes of the parameters that :func:`encoder_states` does not depend on."""
    transformer = _text_transformer(encoder)
    prefix = "" if transformer is encoder else "text_model."
    layers = len(transformer.encoder.layers)
    skipped = [f"{prefix}encoder.layers.{i}." for i in range(layers - skip, layers)]
    return (*skipped, *(() if norm else (f"{prefix}final_layer_norm.",)))


def _text_transformer(encoder: Any) -> Any:
    """Module that contains the layers: ``encoder.text_model`` in transformers before 5.6, else ``encoder``."""
    return getattr(encoder, "text_model", encoder)
