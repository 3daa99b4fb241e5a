"""Control maps estimated by a transformers model that the user chooses: depth, segmentation, pose."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image

from sdtune.data.cache import keys_of_rank
from sdtune.data.control.base import FromImage, fit
from sdtune.data.control.estimators import Estimator
from sdtune.data.control.poses import PoseEstimator
from sdtune.data.samples import Sample, SampleSequence
from sdtune.errors import UserError
from sdtune.files import mark_used
from sdtune.images.files import CENTER
from sdtune.images.grids import save_png
from sdtune.paths import cache_folder, download_model, is_hub_id
from sdtune.progress import bar

_MAX_SIDE = 1024  # longer side of the estimated and cached maps, in pixels


class Estimated(FromImage):
    """Depth, segmentation or pose maps from a transformers model, computed once per image and cached by its content.

    Depth is scaled from black to white between the minimum and maximum of each image, without inverting it: models of
    relative depth (MiDaS, DPT, Depth Anything) output larger values for nearer points. Segmentation classes have the
    colors of PASCAL VOC (Everingham et al. 2010), for any number of classes. Poses are OpenPose skeletons
    (:mod:`sdtune.data.control.poses`); for a mirrored image, left and right are swapped too.

    Args:
        model: a local folder, or a hub id, which is downloaded before training starts.
        task: content of the maps; ``pose`` needs a ViTPose model.
        detector: for ``pose``, the folder or hub id of an object detection model that finds people; None: each image
            shows one person.
    """

    task: Literal["depth", "segmentation", "pose"]

    def __init__(
        self, model: str, task: Literal["depth", "segmentation", "pose"] = "depth", detector: str | None = None
    ) -> None:
        if detector is not None and task != "pose":
            raise UserError(
                f"task={task} uses no detector",
                key="data.control.detector",
                remedy="remove it, or set data.control.task=pose",
            )
        self.model, self.task, self.detector = model, task, detector
        self._sources: list[Path]
        self._map_folder: Path | None = None

    @property
    def _models(self) -> dict[str, str]:
        """Model names by config key."""
        return {"model": self.model, **({} if self.detector is None else {"detector": self.detector})}

    def open(self, samples: SampleSequence) -> None:
        if self.task == "pose" and importlib.util.find_spec("scipy") is None:
            raise UserError(
                "ViTPose of transformers needs scipy", key="data.control.task", remedy="install it: pip install scipy"
            )
        for key, name in self._models.items():
            if not Path(name).expanduser().is_dir() and not is_hub_id(name):
                raise UserError(
                    f"{name} is not a folder",
                    key=f"data.control.{key}",
                    remedy="set a local folder with a transformers model, or a hub id",
                )

    def prepare(
        self,
        samples: Iterable[Sample],
        rank: int = 0,
        processes: int = 1,
        device: torch.device | None = None,
    ) -> None:
        self._locate_models()
        sample_by_content = {s.content(): s for s in samples}
        # Divide all files, not the missing ones: other processes already write files, so each would see others missing.
        rank_samples = [sample_by_content[content] for content in keys_of_rank(sample_by_content, rank, processes)]
        missing = [sample for sample in rank_samples if not all(file.exists() for file in self._files(sample))]
        for sample in rank_samples:
            for file in self._files(sample):
                mark_used(file)
        if not missing:
            return
        estimate = self._estimator(device or torch.device("cpu"))
        with bar(f"Estimating {self.task}", len(missing)) as progress:
            for sample in missing:
                pixels = sample.pixels(_estimation_size(sample.size), CENTER, False)
                for image, file in zip(estimate(pixels), self._files(sample), strict=True):
                    save_png(image, file, sync=False)
                progress(1)

    def extract_maps(self, images: Sequence[np.ndarray], device: torch.device) -> list[np.ndarray]:
        self._locate_models()
        estimate = self._estimator(device)
        return [estimate(image)[0] for image in images]

    def _locate_models(self) -> None:
        """Set the folders of the models and of their cached maps; download models that have a hub id."""
        if self._map_folder is None:
            self._sources = [_folder(key, name) for key, name in self._models.items()]
            self._map_folder = cache_folder() / "control" / f"{self.task}-{'-'.join(map(_hash, self._sources))}"

    def _estimator(self, device: torch.device) -> Callable[[np.ndarray], Sequence[np.ndarray]]:
        """Load the model; the first output of the returned callable is the map of its image."""
        if self.task == "pose":
            return PoseEstimator(self._sources[0], self._sources[1] if self.detector else None, device)
        return Estimator(self._sources[0], self.task, device)

    def _files(self, sample: Sample) -> list[Path]:
        """Cache files of a sample: the map and, for poses, the map with left and right swapped."""
        assert self._map_folder is not None, "call prepare() first"
        endings = ("", "-other-side") if self.task == "pose" else ("",)
        return [self._map_folder / f"{sample.content()}{ending}.png" for ending in endings]

    def content(self, sample: Sample, size: tuple[int, int], flip: bool) -> str:
        assert self._map_folder is not None, "call prepare() first"
        return f"{self._map_folder.name}|{sample.content()}"

    def unmirrored_map(self, sample: Sample, size: tuple[int, int], offset: tuple[float, float]) -> np.ndarray:
        return self._crop(self._files(sample)[0], size, offset)

    def _crop(self, file: Path, size: tuple[int, int], offset: tuple[float, float]) -> np.ndarray:
        with Image.open(file) as image:
            return fit(image, size, offset, "nearest" if self.task == "segmentation" else "bilinear")

    def map(
        self, sample: Sample, size: tuple[int, int], offset: tuple[float, float] = CENTER, flip: bool = False
    ) -> np.ndarray:
        if not flip:
            return self.unmirrored_map(sample, size, offset)
        # For poses the last file has left and right swapped; otherwise it is the only file.
        return np.ascontiguousarray(self._crop(self._files(sample)[-1], size, offset)[:, ::-1])


def _folder(key: str, name: str) -> Path:
    local = Path(name).expanduser()
    return local if local.is_dir() else download_model(name, ("*.json", "*.safetensors"), f"data.control.{key}")


def _estimation_size(size: tuple[int, int]) -> tuple[int, int]:
    """``size``, scaled down if its longer side exceeds :data:`_MAX_SIDE`."""
    scale = min(1.0, _MAX_SIDE / max(size))
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def _hash(folder: Path) -> str:
    """Hash of the configs and weights in ``folder``."""
    digest = hashlib.sha256()
    for file in sorted(f for f in folder.iterdir() if f.suffix in (".json", ".safetensors")):
        with file.open("rb") as handle:
            digest.update(f"{file.name}/{hashlib.file_digest(handle, 'sha256').hexdigest()}".encode())
    return digest.hexdigest()[:32]
