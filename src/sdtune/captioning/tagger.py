"""Tags from WD14 taggers (https://huggingface.co/SmilingWolf), computed by onnxruntime."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import torch
from annotated_types import Interval
from PIL import Image

from sdtune.captioning.models import TAGGER_FILES
from sdtune.errors import UserError

_KEY = "model"

GENERAL, CHARACTER, RATING = 0, 4, 9
"""Values of the column ``category`` of ``selected_tags.csv``."""

_LONGEST_KAOMOJI = 3
"""Characters of the longest tag that keeps its underscores, such as ``^_^``; the rule is that of kohya's script."""


@dataclass(frozen=True)
class TagSettings:
    """Settings of a tagger; names and defaults are those of kohya's ``tag_images_by_wd14_tagger.py``.

    Args:
        general_threshold: minimum probability of general tags.
        character_threshold: minimum probability of names of characters.
        remove_underscore: write spaces instead of underscores; tags of at most three characters, such as ``^_^``, stay.
        undesired_tags: tags that are left out.
        character_tags_first: whether names of characters precede the general tags.
        use_rating_tags: whether the most probable rating is the first tag.
    """

    general_threshold: Annotated[float, Interval(ge=0, le=1)] = 0.35
    character_threshold: Annotated[float, Interval(ge=0, le=1)] = 0.85
    remove_underscore: bool = False
    undesired_tags: tuple[str, ...] = ()
    character_tags_first: bool = False
    use_rating_tags: bool = False


@dataclass(frozen=True)
class Tag:
    """A tag of a tagger: name and category, see :data:`GENERAL`."""

    name: str
    category: int


class Tagger:
    """WD14 tagger.

    Args:
        folder: folder with ``model.onnx`` and ``selected_tags.csv``.
        device: on a GPU, onnxruntime uses CUDA if its installed build supports it.

    Raises:
        UserError: the files cannot be read, or do not fit together.
    """

    def __init__(self, folder: Path, settings: TagSettings, device: torch.device) -> None:
        self._settings = settings
        self._tags = read_tags(folder / TAGGER_FILES[1])
        self._session = _session(folder / TAGGER_FILES[0], device)
        [node] = self._session.get_inputs()
        shape = node.shape
        if len(shape) != 4 or shape[3] != 3 or not isinstance(shape[1], int) or shape[1] != shape[2]:
            raise UserError(
                f"{folder / TAGGER_FILES[0]} has an input of shape {shape}",
                key=_KEY,
                remedy="expected [N, SIDE, SIDE, 3]",
            )
        self._name, self._side = node.name, shape[1]
        self._fixed_batch = shape[0] if isinstance(shape[0], int) else None
        count = self._session.get_outputs()[0].shape[-1]
        if isinstance(count, int) and count != len(self._tags):
            raise UserError(
                f"{folder / TAGGER_FILES[0]} has {count} outputs, but {TAGGER_FILES[1]} has {len(self._tags)} tags",
                key=_KEY,
                remedy="use two files of the same model",
            )

    def __call__(self, images: Sequence[Image.Image]) -> list[str]:
        """Tags of each image, as ``a, b, c``; the images are in mode RGB."""
        pixels = np.stack([tagger_pixels(image, self._side) for image in images])
        return [", ".join(chosen_tags(values, self._tags, self._settings)) for values in self._probabilities(pixels)]

    def _probabilities(self, pixels: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Probabilities [N, tags] of ``pixels`` [N, side, side, 3]; a model may require a fixed batch size."""
        size = self._fixed_batch or len(pixels)
        parts = []
        for start in range(0, len(pixels), size):
            part = pixels[start : start + size]
            padded = np.concatenate([part, np.zeros((size - len(part), *part.shape[1:]), part.dtype)])
            parts.append(self._session.run(None, {self._name: padded})[0][: len(part)])
        return np.concatenate(parts)


def tagger_pixels(image: Image.Image, side: int) -> npt.NDArray[np.float32]:
    """Input of a WD14 tagger: ``image`` (mode RGB) centered on a white square and resized bicubically.

    Returns:
        float32 [side, side, 3], channels in the order blue, green, red, values 0 to 255.
    """
    longer = max(image.size)
    square = Image.new("RGB", (longer, longer), "white")
    square.paste(image, ((longer - image.width) // 2, (longer - image.height) // 2))
    pixels = np.asarray(square.resize((side, side), Image.Resampling.BICUBIC), dtype=np.float32)
    return np.ascontiguousarray(pixels[:, :, ::-1])


def read_tags(file: Path) -> list[Tag]:
    """Tags in ``selected_tags.csv``, in the order of the model's outputs.

    Raises:
        UserError: the file cannot be read, or lacks the columns ``name`` and ``category``.
    """
    try:
        with file.open(encoding="utf-8", newline="") as handle:
            return [Tag(row["name"], int(row["category"])) for row in csv.DictReader(handle)]
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
        raise UserError(
            f"{file} cannot be read ({error})", key=_KEY, remedy="expected a table with the columns name and category"
        ) from error


def chosen_tags(probabilities: npt.NDArray[np.float32], tags: Sequence[Tag], settings: TagSettings) -> list[str]:
    """Names of the ``tags`` whose probability reaches the threshold of their category, in the order of ``tags``.

    Args:
        probabilities: one per tag.
    """
    undesired = {_spaced(name) for name in settings.undesired_tags}
    thresholds = {GENERAL: settings.general_threshold, CHARACTER: settings.character_threshold}
    chosen = [
        tag
        for tag, probability in zip(tags, probabilities, strict=True)
        if tag.category in thresholds and probability >= thresholds[tag.category]
    ]
    if settings.character_tags_first:
        chosen.sort(key=lambda tag: tag.category != CHARACTER)
    ratings = [(probability, tag) for tag, probability in zip(tags, probabilities) if tag.category == RATING]
    if settings.use_rating_tags and ratings:
        chosen.insert(0, max(ratings, key=lambda pair: pair[0])[1])
    names = [tag.name for tag in chosen if _spaced(tag.name) not in undesired]
    return [_spaced(name) for name in names] if settings.remove_underscore else names


def _spaced(name: str) -> str:
    return name.replace("_", " ") if len(name) > _LONGEST_KAOMOJI else name


def _session(file: Path, device: torch.device) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    providers: list[Any] = ["CPUExecutionProvider"]
    if device.type == "cuda" and "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        providers.insert(0, ("CUDAExecutionProvider", {"device_id": device.index or 0}))
    try:
        return onnxruntime.InferenceSession(str(file), options, providers=providers)
    except Exception as error:  # onnxruntime's errors have no common base class
        reason = shorten(str(error), 100, placeholder=" ...")
        raise UserError(f"{file} cannot be loaded ({reason})", key=_KEY, remedy="download it again") from error
