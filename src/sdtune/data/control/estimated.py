"""Control maps estimated by a model that the user names: depth, segmentation, pose."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image

from sdtune.data.cache import share
from sdtune.data.control.base import FromImage, fit
from sdtune.data.control.estimators import Estimator
from sdtune.data.control.poses import PoseEstimator
from sdtune.data.samples import Sample
from sdtune.errors import UserError
from sdtune.images.files import CENTRE
from sdtune.images.grids import save_png
from sdtune.paths import cache_folder, is_hub_id
from sdtune.progress import bar

_LONGEST = 1024  # pixels of the longer side of what is estimated and kept


class Estimated(FromImage):
    """Depth, segmentation or pose by a transformers model, once an image, kept on disk by the image's content.

    Depth is shown from black to white between an image's own least and greatest value, as the model has it: models of
    relative depth (MiDaS, DPT, Depth Anything) give near things the greater ones. A segmentation's classes have the
    colours of PASCAL VOC (Everingham et al. 2010), whatever their number. Poses are OpenPose's skeletons
    (:mod:`sdtune.data.control.poses`); where an image is mirrored, left and right change over too.

    Args:
        model: a local folder, or a hub id, which is downloaded when training begins, because you asked for it.
        task: what the model estimates; for poses a ViTPose.
        detector: for poses, likewise: an object detection model that finds people; without one, each image is taken
            for one person's.
    """

    task: Literal["depth", "segmentation", "pose"]

    def __init__(
        self, model: str, task: Literal["depth", "segmentation", "pose"] = "depth", detector: str | None = None
    ) -> None:
        if detector is not None and task != "pose":
            raise UserError(
                f"{task} needs none",
                key="data.control.detector",
                remedy="leave it out, or choose data.control.task=pose",
            )
        self.model, self.task, self.detector = model, task, detector
        self._sources: list[Path]
        self._kept: Path | None = None

    @property
    def _models(self) -> dict[str, str]:
        """By the key that names each."""
        return {"model": self.model, **({} if self.detector is None else {"detector": self.detector})}

    def open(self, samples: Sequence[Sample]) -> None:
        for key, name in self._models.items():
            if not Path(name).expanduser().is_dir() and not is_hub_id(name):
                raise UserError(
                    f"{name} is not a folder",
                    key=f"data.control.{key}",
                    remedy="name a local folder with a transformers model, or a hub id",
                )

    def prepare(
        self,
        samples: Sequence[Sample],
        rank: int = 0,
        processes: int = 1,
        device: torch.device | None = None,
    ) -> None:
        self._find()
        wanted = {s.content(): s for s in samples}
        # Shared out first: another process may write one of its own while this one looks.
        shared = [wanted[content] for content in share(wanted, rank, processes)]
        mine = [sample for sample in shared if not all(file.exists() for file in self._files(sample))]
        if not mine:
            return
        estimate = self._estimator(device or torch.device("cpu"))
        with bar(f"Estimating {self.task}", len(mine)) as progress:
            for sample in mine:
                pixels = sample.pixels(_whole(sample.size), CENTRE, False)
                for image, file in zip(estimate(pixels), self._files(sample), strict=True):
                    save_png(image, file, sync=False)
                progress(1)

    def again(self, images: Sequence[np.ndarray], device: torch.device) -> list[np.ndarray]:
        self._find()
        estimate = self._estimator(device)
        return [estimate(image)[0] for image in images]

    def _find(self) -> None:
        """The folders of the models, and where their maps are kept; a hub id is asked for here."""
        if self._kept is None:
            self._sources = [_folder(key, name) for key, name in self._models.items()]
            self._kept = cache_folder() / "control" / f"{self.task}-{'-'.join(map(_hash, self._sources))}"

    def _estimator(self, device: torch.device) -> Callable[[np.ndarray], Sequence[np.ndarray]]:
        """An image's map, first of what it gives."""
        if self.task == "pose":
            return PoseEstimator(self._sources[0], self._sources[1] if self.detector else None, device)
        return Estimator(self._sources[0], self.task, device)

    def _files(self, sample: Sample) -> list[Path]:
        """The map's, and a pose's with left and right changed over."""
        assert self._kept is not None, "prepare() comes first"
        ends = ("", "-other-side") if self.task == "pose" else ("",)
        return [self._kept / f"{sample.content()}{end}.png" for end in ends]

    def crop(self, sample: Sample, size: tuple[int, int], offset: tuple[float, float]) -> np.ndarray:
        return self._crop(self._files(sample)[0], size, offset)

    def _crop(self, file: Path, size: tuple[int, int], offset: tuple[float, float]) -> np.ndarray:
        with Image.open(file) as image:
            return fit(image, size, offset, "nearest" if self.task == "segmentation" else "bilinear")

    def map(
        self, sample: Sample, size: tuple[int, int], offset: tuple[float, float] = CENTRE, flip: bool = False
    ) -> np.ndarray:
        if not flip:
            return self.crop(sample, size, offset)
        return np.ascontiguousarray(self._crop(self._files(sample)[-1], size, offset)[:, ::-1])


def _folder(key: str, name: str) -> Path:
    local = Path(name).expanduser()
    if local.is_dir():
        return local
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors"]))
    except (HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"{name} is neither a local folder nor to be had from the hub ({reason})", key=f"data.control.{key}"
        ) from error


def _whole(size: tuple[int, int]) -> tuple[int, int]:
    """``size`` without enlarging it, its longer side at most :data:`_LONGEST`."""
    scale = min(1.0, _LONGEST / max(size))
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def _hash(folder: Path) -> str:
    """Of everything in ``folder`` that an estimate depends on."""
    digest = hashlib.sha256()
    for file in sorted(f for f in folder.iterdir() if f.suffix in (".json", ".safetensors")):
        with file.open("rb") as handle:
            digest.update(f"{file.name}/{hashlib.file_digest(handle, 'sha256').hexdigest()}".encode())
    return digest.hexdigest()[:32]
