"""Control maps of any kind that are read from files: those that a table of samples names."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sdtune.data.control.base import Control, Resample, fit
from sdtune.errors import UserError
from sdtune.images.files import SUFFIXES, open_image

if TYPE_CHECKING:
    from sdtune.data.samples import Sample, SampleSequence
    from sdtune.data.table import StoredImage

_ASPECT_TOLERANCE = 0.01


class Paired(Control):
    """Control maps from files: segmentation, depth, pose, or any other kind.

    For ``data=folder``, the maps are in a folder and named like the images: the map of ``a/b.jpg`` is ``b.png`` (or
    another image suffix) in the folder, or ``a/b.png`` if the folder has the sub-folders of the images. For
    ``data=table``, the table names them.

    Args:
        path: folder of the maps; None: the maps that the table names.
        resample: filter that scales a map to its image's size; ``nearest`` for segmentation, so that classes do not
            blend.
    """

    reads_files = True

    def __init__(self, path: str | None = None, resample: Resample = "bilinear") -> None:
        self.path = None if path is None else Path(path).expanduser().absolute()
        self.resample = resample

    def open(self, samples: SampleSequence) -> None:
        maps = samples.control_sizes()
        if maps is None:
            raise UserError(
                "paired maps are found by image file name, but this data has no image files",
                key="data.control",
                remedy="use data=folder, data=table or another data/control",
            )
        missing = np.flatnonzero(maps[:, 0] == 0)
        if len(missing):
            sample = samples[int(missing[0])]
            found = _stored_map(sample)
            if found is not None:
                raise UserError(
                    f"{found.place} {found.problem}", key="data.control.path", remedy="remove or replace it"
                )
            raise UserError(
                f"{len(missing)} of {len(samples)} images have no control map, the first is {sample}",
                key="data.control.path",
                remedy="add the maps, or make the table again with them",
            )
        sizes = samples.sizes
        ratios = maps[:, 0] * sizes[:, 1] / (maps[:, 1] * sizes[:, 0])
        for index in np.flatnonzero(abs(ratios - 1) > _ASPECT_TOLERANCE)[:1].tolist():
            sample = samples[index]
            found = _stored_map(sample)
            assert found is not None
            raise UserError(
                f"{found.place} is {found.width}x{found.height} pixels but its image is"
                f" {sample.size[0]}x{sample.size[1]}",
                key="data.control.path",
                remedy="make a map of the full image, with the same aspect ratio",
            )

    def content(self, sample: Sample, size: tuple[int, int], flip: bool) -> str:
        found = _stored_map(sample)
        assert found is not None
        found.unchanged("data.control.path")
        assert found.sha256 is not None, "open() refuses unreadable maps"
        return f"{found.sha256.hex()}|{self.resample}"

    def unmirrored_map(self, sample: Sample, size: tuple[int, int], offset: tuple[float, float]) -> np.ndarray:
        found = _stored_map(sample)
        assert found is not None
        place = found.unchanged("data.control.path")
        return fit(open_image(place, "data.control.path"), size, offset, self.resample)


def _stored_map(sample: Sample) -> StoredImage | None:
    found: StoredImage | None = getattr(sample, "control", None)
    return found


def maps_of_images(images: Sequence[Path], folder: str | Path) -> dict[Path, Path]:
    """The map of each image: a file with its name in ``folder``, see :class:`Paired`.

    Raises:
        UserError: ``folder`` is none, an image has no map, or two files or images have the same name.
    """
    path = Path(folder).expanduser().absolute()
    if not path.is_dir():
        raise UserError(
            f"{path} is not a folder",
            key="data.control.path",
            remedy="set a folder of maps that are named like the images",
        )
    files: dict[tuple[str, ...], Path] = {}
    for file in sorted(f for f in path.rglob("*") if f.suffix.lower() in SUFFIXES):
        name = file.relative_to(path).with_suffix("").parts
        if name in files:
            raise UserError(
                f"{file} and {files[name].name} have the same name without suffix",
                key="data.control.path",
                remedy="remove one",
            )
        files[name] = file
    maps: dict[Path, Path] = {}
    image_of_map: dict[Path, Path] = {}
    for image in images:
        parts = image.with_suffix("").parts
        map_file = next((files[parts[i:]] for i in range(1, len(parts)) if parts[i:] in files), None)
        if map_file is None:
            raise UserError(f"no map for {image}", key="data.control.path", remedy=f"add {image.stem}.png to {path}")
        first_image = image_of_map.setdefault(map_file, image)
        if first_image != image:
            raise UserError(
                f"{map_file} is the map of {first_image} and of {image}",
                key="data.control.path",
                remedy="put the maps into sub-folders named like those of the images",
            )
        maps[image] = map_file
    return maps
