"""The evaluation for any backbone: fixed prompts and seeds, before and after."""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from annotated_types import Ge

from sdtune import adapters, controlnets
from sdtune.backbone import Facts, Pretrained
from sdtune.backbone.backbone import Backbone
from sdtune.data import PictureData
from sdtune.data.previews import wanted
from sdtune.evaluation.clip import Clip, clip_image, clip_text
from sdtune.grids import grid, save_png
from sdtune.hardware import precision
from sdtune.paths import cache_folder
from sdtune.sampling import Request, Sampling, generate

REFERENCES = 64
"""Training pictures that stand for the subject, at most."""


@contextmanager
def trained(source: Pretrained, artifact: Path, name: str, device: torch.device) -> Iterator[Backbone]:
    """The backbone with the artifact of a run: what others load is what is measured, not the weights in memory."""
    whole = artifact / name
    pipeline = (whole / "model_index.json").is_file()
    own = Pretrained(str(whole)) if pipeline else source
    backbone = own.load().to(device)
    backbone.suit(device)
    nets = controlnets.load(backbone, source, [str(whole)]) if whole.is_dir() and not pipeline else []
    files = [adapters.AdapterFile(str(artifact))] if any(artifact.glob("*.safetensors")) else []
    loaded = adapters.load(backbone, own.hash(), files)
    with controlnets.applied(backbone, nets, [1.0] * len(nets)), adapters.applied(backbone, loaded, [1.0] * len(files)):
        yield backbone


@contextmanager
def base(source: Pretrained, device: torch.device) -> Iterator[Backbone]:
    """The backbone as it was."""
    backbone = source.load().to(device)
    backbone.suit(device)
    yield backbone


def draw(backbone: Backbone, requests: Sequence[Request], sampling: Sampling) -> list[np.ndarray]:
    """The requested pictures, in bfloat16 where the device multiplies it itself."""
    kind = backbone.device.type
    half = precision("auto", kind) == "bf16-mixed"
    with torch.autocast(kind, torch.bfloat16, enabled=half):
        return list(generate(backbone, requests, sampling))


def draw_base(
    source: Pretrained, requests: Sequence[Request], sampling: Sampling, device: torch.device
) -> list[np.ndarray]:
    """What the backbone draws as it was; kept by content, so that runs on one backbone draw it once.

    The drawing hangs on the device's kind and precision too, and these name it.
    """
    assert not any(request.maps for request in requests), "maps are not in the name"
    wanted = repr((source.drawing_key(), device.type, precision("auto", device.type), sampling, list(requests)))
    file = cache_folder() / "base" / f"{hashlib.sha256(wanted.encode()).hexdigest()}.npy"
    if not file.exists():
        with base(source, device) as backbone:
            pictures = np.stack(draw(backbone, requests, sampling))
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_name(f"{file.stem}.{uuid.uuid4().hex}.partial")
        with partial.open("wb") as handle:
            np.save(handle, pictures)
        partial.replace(file)
    return list(np.load(file))


def references(data: PictureData) -> list[np.ndarray]:
    """Training pictures as they are trained, at most :data:`REFERENCES` of them."""
    step = max(1, len(data.train) // REFERENCES)
    return [s.pixels(data.bucket(s), (0.5, 0.5), False) for s in data.train[::step]][:REFERENCES]


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
        return figures
