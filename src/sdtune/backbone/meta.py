"""A backbone on the meta device, built from its configs: no weights are read or downloaded."""

from __future__ import annotations

import tempfile
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPTokenizer

from sdtune.backbone.backbone import Backbone
from sdtune.backbone.loading import assemble_backbone, read_tokenizer
from sdtune.backbone.models import from_config
from sdtune.backbone.pretrained import Pretrained
from sdtune.backbone.vocabulary import write_tokenizer


class MetaPretrained(Pretrained):
    """What :class:`Pretrained` is, without its weights: for counting."""

    @cached_property
    def _folder(self) -> Path:
        return self._configs

    def load(self, seed: int = 0, unet: torch.dtype | None = None) -> Backbone:
        folder = self.folder()
        with torch.device("meta"):
            parts: dict[str, Any] = {name: from_config(name, folder) for name in self.components}
        # The schedule's tables are small, and checks of them need values.
        with torch.device("cpu"):
            return assemble_backbone(self, parts | {name: _tokenizer(folder / name) for name in self.tokenizers})


def _tokenizer(folder: Path) -> CLIPTokenizer:
    """The folder's; CLIP's own where it has none."""
    if folder.is_dir():
        return read_tokenizer(folder)
    with tempfile.TemporaryDirectory() as place:
        write_tokenizer(Path(place))
        return read_tokenizer(Path(place))
