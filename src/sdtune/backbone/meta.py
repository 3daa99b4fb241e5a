"""Backbone on the meta device, built from its configs; no weights are read (a single file is converted once)."""

from __future__ import annotations

import tempfile
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import T5TokenizerFast

from sdtune.backbone.backbone import Backbone
from sdtune.backbone.families import T5
from sdtune.backbone.loading import T5_DTYPE, assemble_backbone, read_tokenizer
from sdtune.backbone.models import from_config
from sdtune.backbone.pretrained import Pretrained
from sdtune.backbone.vocabulary import write_tokenizer


class MetaPretrained(Pretrained):
    """:class:`Pretrained` without weights: loads on the meta device, for counting parameters and memory."""

    @cached_property
    def _folder(self) -> Path:
        return self._configs

    def load(self, seed: int = 0, denoiser_dtype: torch.dtype | None = None) -> Backbone:
        folder = self.folder()
        with torch.device("meta"):
            models: dict[str, Any] = {
                "denoiser" if name == self.denoiser_folder else name: from_config(name, folder)
                for name in self.components
            }
        # As the weights are loaded: this includes the position table of a transformer, a buffer.
        # diffusers' own to() warns of modules to keep in float32, even if there are none.
        nn.Module.to(models["denoiser"], denoiser_dtype or torch.float32)
        if T5 in models:
            models[T5].to(T5_DTYPE)
        # The tables of the probability path are small, and its checks need values.
        with torch.device("cpu"):
            return assemble_backbone(self, models | {name: _tokenizer(folder / name) for name in self.tokenizers})


def _tokenizer(folder: Path) -> Any:
    """Tokenizer in ``folder``; if it does not exist, that of CLIP, or a tiny one in place of T5's."""
    if folder.is_dir():
        return read_tokenizer(folder)
    if folder.name == "tokenizer_3":
        return T5TokenizerFast(vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)])
    with tempfile.TemporaryDirectory() as temporary_folder:
        write_tokenizer(Path(temporary_folder))
        return read_tokenizer(Path(temporary_folder))
