"""Tokenize prompts in windows, and encode them to the text states that condition a UNet."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPTokenizer


def windowed(tokenizer: CLIPTokenizer, prompts: Sequence[str], length: int, windows: int) -> Tensor:
    """Token ids, int64 [B, ``length``], of ``windows`` equal windows, each with a start and an end of its own.

    Longer prompts are cut. This is how A1111 and ComfyUI read long prompts; kohya's trainer drops the inner ends.
    """
    if windows == 1:
        ids: Tensor = tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        ).input_ids
        return ids
    window = length // windows
    start, end, pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    rows = []
    for tokens in tokenizer(list(prompts), add_special_tokens=False).input_ids:
        row: list[int] = []
        for first in range(0, windows * (window - 2), window - 2):
            part = [start, *tokens[first : first + window - 2], end]
            row += part + [pad] * (window - len(part))
        rows.append(row)
    return torch.tensor(rows, dtype=torch.long)


def hidden(encoder: Any, out: Any, skip: int, norm: bool = True) -> Tensor:
    """States [B, L, D] that leave ``skip`` of the last layers out, after the final norm where ``norm`` is set.

    ``skip`` counts as diffusers does. SD 1.x and 2.x apply the final norm again, SDXL does not.
    """
    states: Tensor = out.hidden_states[-(skip + 1)]
    return _inner(encoder).final_layer_norm(states) if norm else states


def unused(encoder: Any, skip: int, norm: bool = True) -> tuple[str, ...]:
    """Starts of the names of what lies behind those states."""
    inner = _inner(encoder)
    start = "" if inner is encoder else "text_model."
    layers = len(inner.encoder.layers)
    found = [f"{start}encoder.layers.{i}." for i in range(layers - skip, layers)]
    return (*found, *(() if norm else (f"{start}final_layer_norm.",)))


def _inner(encoder: Any) -> Any:
    """The part with the layers, which releases of transformers before 5.6 keep one level down."""
    return getattr(encoder, "text_model", encoder)
