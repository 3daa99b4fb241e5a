"""SampleSequence of a table: rows with the settings of a training applied; objects are made when they are asked for."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

from sdtune.data.captions import CaptionRules, CaptionTexts
from sdtune.data.samples import SampleSequence
from sdtune.data.table import MappedTable, StoredImage
from sdtune.images.files import open_alpha, open_image, open_mask, resize_and_crop
from sdtune.images.places import Place

MaskSource = Literal["file", "alpha"]
"""Source of an image's loss mask: a mask file, or the transparency of the image."""


@dataclass(frozen=True)
class TableSample:
    """Sample of a table; see :class:`sdtune.data.samples.Sample`.

    Args:
        table: the table.
        row: its row.
        rules: from captions to prompts.
        size: (width, height) in pixels.
        repeats: uses per epoch.
        mask_source: source of the loss mask; None without masks.
    """

    table: MappedTable
    row: int
    rules: CaptionRules
    size: tuple[int, int]
    repeats: int
    mask_source: MaskSource | None = None

    def __str__(self) -> str:
        return str(self._image.place)

    @property
    def _image(self) -> StoredImage:
        image = self.table.image(self.row, "image")
        assert image is not None
        return image

    @property
    def place(self) -> Place:
        """Where the bytes of the image are."""
        return self._image.place

    @property
    def caption(self) -> str:
        """The caption without draws."""
        return self.rules.fixed(self.table.texts_of(self.row))

    @property
    def control(self) -> StoredImage | None:
        """Control map in the table."""
        return self.table.image(self.row, "control")

    def content(self) -> str:
        """Hash of the bytes of the image."""
        digest = self._image.sha256
        assert digest is not None
        return digest.hex()

    def pixels(self, size: tuple[int, int], offset: tuple[float, float], flip: bool) -> np.ndarray:
        return resize_and_crop(open_image(self._image.unchanged("data.path")), size, offset, flip)

    def mask(self, size: tuple[int, int], offset: tuple[float, float], flip: bool) -> np.ndarray:
        """Loss mask uint8 [H, W], 255 where the loss counts."""
        return resize_and_crop(self._mask_image().convert("RGB"), size, offset, flip)[..., 0]

    def _mask_image(self) -> Image.Image:
        if self.mask_source == "file":
            mask = self.table.image(self.row, "mask")
            assert mask is not None
            return open_mask(mask.unchanged("data.mask"), "data.mask")
        return open_alpha(self._image.unchanged("data.mask")) or Image.new("L", self.size, 255)


class TableSamples(SampleSequence):
    """Rows of a table as samples.

    Args:
        table: the table.
        rules: from captions to prompts.
        repeats: factor on the repeats of the table.
        mask_source: source of the loss masks; None without masks.
        rows: the rows, int64 [N]; None: all.
    """

    def __init__(
        self,
        table: MappedTable,
        rules: CaptionRules,
        repeats: int = 1,
        mask_source: MaskSource | None = None,
        rows: npt.NDArray[np.int64] | None = None,
    ) -> None:
        self.table, self.rules, self._factor, self._mask_source = table, rules, repeats, mask_source
        self.rows = np.arange(len(table)) if rows is None else rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> TableSample:  # type: ignore[override]
        width, height = self.sizes[index].tolist()
        row = int(self.rows[index])
        return TableSample(self.table, row, self.rules, (width, height), int(self.repeats[index]), self._mask_source)

    @cached_property
    def sizes(self) -> npt.NDArray[np.int64]:
        return np.stack([self.table.image_numbers("image", name)[self.rows] for name in ("width", "height")], axis=1)

    @cached_property
    def repeats(self) -> npt.NDArray[np.int64]:
        return self.table.repeats()[self.rows] * self._factor

    def control_sizes(self) -> npt.NDArray[np.int64]:
        return np.stack([self.table.image_numbers("control", name)[self.rows] for name in ("width", "height")], axis=1)

    def texts(self, index: int) -> CaptionTexts:
        return self.table.texts_of(int(self.rows[index]))

    def every_texts(self) -> Iterator[CaptionTexts]:
        every = self.table.every_texts()
        if len(self.rows) == len(self.table):
            return every
        wanted = np.zeros(len(self.table), bool)
        wanted[self.rows] = True
        return (texts for texts, is_wanted in zip(every, wanted, strict=True) if is_wanted)

    def first(self, count: int | None) -> TableSamples:
        return self if count is None or count >= len(self) else self.select(np.arange(count))

    def once(self) -> TableSamples:
        """The same samples, each used once per epoch."""
        samples = self.select(np.arange(len(self)))
        samples.repeats = np.ones(len(self), np.int64)
        return samples

    def image(self, index: int) -> StoredImage:
        """The stored image of sample ``index``."""
        image = self.table.image(int(self.rows[index]), "image")
        assert image is not None
        return image

    def mask_image(self, index: int) -> StoredImage | None:
        """The stored mask of sample ``index``; None if it has none."""
        return self.table.image(int(self.rows[index]), "mask")

    def without(self, others: TableSamples) -> TableSamples:
        """The samples that are none of ``others``: the same bytes of the same file."""
        places = {others.image(index).place for index in range(len(others))}
        in_same_file = self.table.is_in_file({str(place.file) for place in places})[self.rows]
        same = [index for index in np.flatnonzero(in_same_file).tolist() if self.image(index).place in places]
        return self.select(np.delete(np.arange(len(self)), same))

    def is_damaged(self) -> npt.NDArray[np.bool_]:
        """Whether each image cannot be decoded, bool [N]."""
        return self.table.has("image", "problem")[self.rows]

    def indices_of(self, flag: str, column: str = "image") -> npt.NDArray[np.int64]:
        """Indices of the samples whose image or mask is ``blank`` or ``transparent``."""
        return np.flatnonzero(self.table.image_numbers(column, flag)[self.rows])

    def text_counts(self, column: str) -> npt.NDArray[np.int64]:
        """Number of captions, or sentences, of each sample, int64 [N]."""
        return self.table.text_counts(column)[self.rows]

    def has_bad_mask(self) -> npt.NDArray[np.bool_]:
        """Whether the mask of each sample is missing, is damaged, or has another size than the image, bool [N]."""
        sizes = [self.table.image_numbers("mask", name)[self.rows] for name in ("width", "height")]
        is_bad: npt.NDArray[np.bool_] = (np.stack(sizes, axis=1) != self.sizes).any(axis=1)
        return is_bad

    def select(self, indices: npt.NDArray[np.int64]) -> TableSamples:
        return TableSamples(self.table, self.rules, self._factor, self._mask_source, self.rows[indices])

    def update_digest(
        self, update: Callable[[bytes], object], mask_sizes: npt.NDArray[np.int32] | None, *, maps: bool
    ) -> None:
        facts, rows = self.table.facts, hashlib.sha256(self.rows.tobytes()).hexdigest()
        update(f"{facts.digest}|{rows}|{self._factor}|{self.rules}\n".encode())
        if mask_sizes is not None:
            update(f"{self._mask_source}|{facts.mask_digest if self._mask_source == 'file' else ''}\n".encode())
        if maps:
            update(f"{facts.control_digest}\n".encode())
