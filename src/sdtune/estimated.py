"""Control maps by a model that the user names."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from sdtune.data.cache import share
from sdtune.data.control import CENTRE, Control, fit
from sdtune.data.progress import bar
from sdtune.data.samples import Sample
from sdtune.grids import save_png
from sdtune.paths import cache_folder

_LONGEST = 1024  # pixels of the longer side of what is estimated and kept


class Estimated(Control):
    """Depth or segmentation by a transformers model, once a picture, kept on disk by the picture's content.

    Depth is shown from black to white between a picture's own least and greatest value, as the model has it: models of
    relative depth (MiDaS, DPT, Depth Anything) give near things the greater ones. A segmentation's classes have the
    colours of PASCAL VOC (Everingham et al. 2010), whatever their number.

    Args:
        model: a local folder, or a hub id, which is downloaded when training begins, because you asked for it.
        task: what the model estimates.
    """

    def __init__(self, model: str, task: Literal["depth", "segmentation"] = "depth") -> None:
        self.model, self.task = model, task
        self._source: Path
        self._kept: Path | None = None

    def open(self, samples: Sequence[Sample]) -> None:
        local = Path(self.model).expanduser()
        named_as_folder = self.model.startswith(("/", ".", "~")) or self.model.count("/") != 1
        if not local.is_dir() and named_as_folder:
            raise ValueError(
                f"data.control.model: {self.model} is not a folder; name a local folder with a transformers model, or"
                " a hub id"
            )

    def prepare(
        self,
        samples: Sequence[Sample],
        rank: int = 0,
        processes: int = 1,
        device: torch.device | None = None,
    ) -> None:
        if self._kept is None:
            self._source = self._folder()
            self._kept = cache_folder() / "control" / f"{self.task}-{_hash(self._source)}"
        wanted = {s.content(): s for s in samples}
        # Shared out first: another process may write one of its own while this one looks.
        shared = [wanted[content] for content in share(wanted, rank, processes)]
        mine = [sample for sample in shared if not self._file(sample).exists()]
        if not mine:
            return
        estimate = _Estimator(self._source, self.task, device or torch.device("cpu"))
        with bar(f"Estimating {self.task}", len(mine)) as progress:
            for sample in mine:
                save_png(estimate(sample.pixels(_whole(sample.size), CENTRE, False)), self._file(sample))
                progress(1)

    def _folder(self) -> Path:
        local = Path(self.model).expanduser()
        if local.is_dir():
            return local
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

        try:
            return Path(snapshot_download(self.model, allow_patterns=["*.json", "*.safetensors"]))
        except (HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError, OSError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ValueError(
                f"data.control.model: {self.model} is neither a local folder nor to be had from the hub ({reason})"
            ) from error

    def _file(self, sample: Sample) -> Path:
        assert self._kept is not None, "prepare() comes first"
        return self._kept / f"{sample.content()}.png"

    def crop(self, sample: Sample, size: tuple[int, int], offset: tuple[float, float]) -> np.ndarray:
        with Image.open(self._file(sample)) as picture:
            return fit(picture, size, offset, "bilinear" if self.task == "depth" else "nearest")


class _Estimator:
    def __init__(self, folder: Path, task: str, device: torch.device) -> None:
        from transformers import AutoImageProcessor, AutoModelForDepthEstimation, AutoModelForSemanticSegmentation

        kind = AutoModelForDepthEstimation if task == "depth" else AutoModelForSemanticSegmentation
        self.device = device
        try:
            self.processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True)
            model = kind.from_pretrained(folder, use_safetensors=True, local_files_only=True)
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ValueError(f"data.control.model: {folder} holds no model for {task} ({reason})") from error
        self.model, self.task = model.eval().to(self.device), task

    @torch.no_grad()
    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        """uint8 [H, W, 3] of uint8 [H, W, 3]."""
        inputs = self.processor(images=Image.fromarray(pixels), return_tensors="pt").to(self.device)
        outputs = self.model(**inputs)
        values = outputs.predicted_depth[:, None] if self.task == "depth" else outputs.logits
        values = F.interpolate(values.float(), size=pixels.shape[:2], mode="bilinear")[0]
        if self.task == "segmentation":
            return _colours(values.argmax(0).cpu().numpy())
        low, high = values.min(), values.max()
        grey = ((values - low) / (high - low).clamp(min=1e-12) * 255).round().to(torch.uint8)
        return grey.expand(3, -1, -1).permute(1, 2, 0).cpu().numpy()


def _whole(size: tuple[int, int]) -> tuple[int, int]:
    """``size`` without enlarging it, its longer side at most :data:`_LONGEST`."""
    scale = min(1.0, _LONGEST / max(size))
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def _colours(classes: np.ndarray) -> np.ndarray:
    """uint8 [H, W, 3]: three bits of a class's number at a time go to the next lower bit of red, green and blue."""
    rgb = np.zeros((*classes.shape, 3), dtype=np.uint8)
    for place in range(8):
        for channel in range(3):
            rgb[..., channel] |= ((classes >> (3 * place + channel) & 1) << (7 - place)).astype(np.uint8)
    return rgb


def _hash(folder: Path) -> str:
    """Of everything in ``folder`` that an estimate depends on."""
    digest = hashlib.sha256()
    for file in sorted(f for f in folder.iterdir() if f.suffix in (".json", ".safetensors")):
        with file.open("rb") as handle:
            digest.update(f"{file.name}/{hashlib.file_digest(handle, 'sha256').hexdigest()}".encode())
    return digest.hexdigest()[:32]
