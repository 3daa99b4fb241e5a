"""The evaluation for any backbone: fixed prompts and seeds, before and after."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
from annotated_types import Ge

from sdtune.backbone import Facts, Pretrained
from sdtune.data import PictureData
from sdtune.data.previews import wanted
from sdtune.evaluation.clip import Clip, clip_image, clip_text
from sdtune.evaluation.drawing import base, draw, references, trained
from sdtune.evaluation.strengths import strength_grid
from sdtune.grids import grid, save_png
from sdtune.sampling import Request, Sampling


class ClipFigures:
    """``clip_image`` and ``clip_text`` of the trained model and of the base, on fixed prompts and seeds.

    Args:
        prompts: what is drawn; the data's own captions (at most eight) if None.
        pictures: how many pictures in all, shared out over the prompts.
        seed: of the first picture; the others follow.
        clip: the folder of a CLIP; without one the figures are null, and nothing is downloaded.
        sampling: how.
    """

    def __init__(
        self,
        prompts: Sequence[str] | None = None,
        pictures: Annotated[int, Ge(1)] = 32,
        seed: Annotated[int, Ge(0)] = 1000,
        clip: str | None = None,
        sampling: Sampling | None = None,
    ) -> None:
        self.prompts, self.count, self.seed, self.clip = prompts, pictures, seed, clip
        self.sampling = sampling or Sampling()

    def check(self, data: PictureData, facts: Facts) -> None:
        """ValueError before any weights are loaded."""
        self.sampling.check(facts.factor)
        if self.clip not in (None, "pocket") and not Path(str(self.clip)).expanduser().is_dir():
            raise ValueError(f"evaluation.clip: {self.clip} is not a folder; name a local folder with a CLIP model")

    def run(
        self, source: Pretrained, data: PictureData, artifact: Path, name: str, device: torch.device, folder: Path
    ) -> dict[str, Any]:
        """The figures; grids of what was measured go to ``folder``."""
        keys = ("clip_image", "clip_text", "base_clip_image", "base_clip_text")
        if self.clip is None:
            reason = "no CLIP named: evaluation.clip=FOLDER measures with one; nothing is downloaded unasked"
            return {**dict.fromkeys(keys), "reasons": dict.fromkeys(keys, reason)}
        asked = wanted(data, self.prompts, 8, self.sampling.size(source.facts.side))
        shown_for = [asked[i % len(asked)] for i in range(self.count)]
        requests = [Request(one.prompt, self.seed + i, one.maps) for i, one in enumerate(shown_for)]
        clip, shown = Clip(self.clip, device), references(data)
        figures: dict[str, Any] = {}
        for prefix, model in (("base_", base(source, device)), ("", trained(source, artifact, name, device))):
            with model as backbone:
                pictures = draw(backbone, requests, self.sampling)
            figures[f"{prefix}clip_image"] = clip_image(clip, pictures, shown)
            figures[f"{prefix}clip_text"] = clip_text(clip, pictures, [r.prompt for r in requests])
            sheet = grid([pictures[i : i + 8] for i in range(0, min(64, len(pictures)), 8)])
            save_png(sheet, folder / f"{prefix or 'trained_'}pictures.png")
        strength_grid(source, artifact, requests, self.sampling, device, folder)
        return figures
