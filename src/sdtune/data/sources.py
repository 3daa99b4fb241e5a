"""Data modules for image files: a folder, or a table of samples."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from annotated_types import Ge

from sdtune.data.captions import CaptionRules
from sdtune.data.control.paired import Paired
from sdtune.data.datamodule import ImageDataModule
from sdtune.data.folder import folder_table, is_root_name_warning, kohya_parent
from sdtune.data.samples import SampleSequence
from sdtune.data.skipped import write_skipped
from sdtune.data.table import MappedTable, open_table
from sdtune.data.table_samples import TableSamples
from sdtune.errors import UserError

_SHOWN = 3
"""Images that a warning names."""

_MOST_LISTED = 20
"""Damaged images that an error names; more are in a file."""

TABLE_SUFFIX = ".arrow"
"""Suffix of a table of samples, by which data.class_path and data.validation_path are told from folders."""


@dataclass(kw_only=True, eq=False)
class FileImages(ImageDataModule):
    """Base class of the data modules for image files.

    Args:
        prompt: caption of the images that have no other caption.
        trigger: trigger word, put before each caption that does not start with it; it stays when a caption is
            dropped.
        repeats: repeats of each image, multiplied by those that the source asks for, as a folder name ``10_words``.
        hold_out: hold out every n-th image for the validation loss (10: one in ten).
        validation_path: separate folder or table of images for the validation loss.
        damaged: images that cannot be decoded: ``stop`` lists them and ends, ``skip`` leaves them out and lists them in
            the run's ``skipped.csv``.
    """

    path: str
    prompt: str | None = None
    trigger: str | None = None
    repeats: Annotated[int, Ge(1)] = 1
    hold_out: Annotated[int, Ge(2)] | None = None
    validation_path: str | None = None
    damaged: Literal["stop", "skip"] = "stop"

    _uses_prompt: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.name, self.skips_damaged = Path(self.path).expanduser().resolve().stem, self.damaged == "skip"
        if self.hold_out and self.validation_path:
            raise UserError(
                "cannot be combined with data.validation_path", key="data.hold_out", remedy="remove one of the two"
            )

    @abstractmethod
    def table(self, path: str, key: str, count: int | None) -> MappedTable:
        """The table of the images in ``path``.

        Args:
            key: config key of ``path``, for errors.
            count: number of images that are needed; None: all.
        """

    def read(self) -> tuple[SampleSequence, SampleSequence]:
        self._uses_prompt = False
        rules = CaptionRules(self.captions, self.prompt, self.trigger)
        every = self._samples(self.path, "data.path", rules, self._needed())
        held_out = every.select(np.zeros(0, np.int64))
        train = every
        if self.validation_path:
            held_out = self._samples(self.validation_path, "data.validation_path", rules, None)
            train = every.without(held_out)
        elif self.hold_out:
            indices = np.arange(len(every))
            held_out = every.select(indices[self.hold_out - 1 :: self.hold_out])
            train = every.select(indices[indices % self.hold_out != self.hold_out - 1])
            if not len(held_out):
                raise UserError(
                    f"{self.path} has {len(every)} images, too few to hold out one in {self.hold_out}",
                    key="data.hold_out",
                    remedy="set a smaller number or add images",
                )
        if not len(train):
            raise UserError(
                "all images are validation images, none is left for the training",
                key="data.validation_path",
                remedy="set another folder",
            )
        train, held_out = train.first(self.limit), held_out.first(self.validation_limit).once()
        self._note_captions()
        for samples in (train, held_out):
            self._check_masks(samples)
        if self.mask == "alpha" and not len(train.indices_of("transparent")):
            self.notices.append("WARNING: data.mask=alpha, but no image has transparency; all pixels count")
        return train, held_out

    def read_class(self, path: str) -> SampleSequence:
        assert isinstance(self.class_prompt, str | None)
        rules = CaptionRules(prompt=self.class_prompt)
        return self._samples(path, "data.class_path", rules, None, masks=False).once()

    def _needed(self) -> int | None:
        """Number of images that a limited training needs; None: all."""
        if self.limit is None or (self.hold_out and self.validation_limit is None) or self.validation_path:
            return None
        if not self.hold_out:
            return self.limit
        assert self.validation_limit is not None
        for_training = self.limit + (self.limit - 1) // (self.hold_out - 1)
        return max(for_training, self.validation_limit * self.hold_out)

    def _samples(
        self, path: str, key: str, rules: CaptionRules, count: int | None, *, masks: bool = True
    ) -> TableSamples:
        """The usable images in ``path``.

        Raises:
            UserError: images are damaged and ``damaged`` is ``stop``, or an image has no caption.
        """
        wanted = count
        while True:
            table = self.table(path, key, wanted)
            samples = TableSamples(table, rules, self.repeats, self.mask if masks else None).first(wanted)
            missing = int(samples.is_damaged().sum()) - (0 if wanted is None or count is None else wanted - count)
            if wanted is None or missing <= 0 or len(samples) < wanted or self.damaged == "stop":
                break
            wanted += missing  # more images, in place of the damaged ones
        self.notices += [line for line in table.facts.notices if self.repeats == 1 or not is_root_name_warning(line)]
        if not rules.trigger and table.facts.empty_captions:
            self.notices.append(f"WARNING: the captions of these images are empty: {table.facts.empty_captions}")
        samples = self._without_damaged(samples, key)
        self._check_captions(samples, path, key)
        for index in samples.indices_of("blank")[:_SHOWN].tolist():
            self.notices.append(f"WARNING: {samples[index]} is transparent everywhere; it is trained as a white image")
        return samples

    def _without_damaged(self, samples: TableSamples, key: str) -> TableSamples:
        is_damaged = samples.is_damaged()
        if not is_damaged.any():
            return samples
        damaged = [samples.image(int(index)) for index in np.flatnonzero(is_damaged)]
        if self.damaged == "stop":
            shown = "; ".join(f"{image.place} {image.problem}" for image in damaged[:_MOST_LISTED])
            if len(damaged) > _MOST_LISTED:
                write_skipped(samples.table.file.parent, damaged)
                shown += f"; all of them are in {samples.table.file.parent / 'skipped.csv'}"
            if len(damaged) == 1:
                raise UserError(shown, key=key, remedy="remove or replace it, or set data.damaged=skip")
            raise UserError(
                f"{len(damaged)} of {len(samples)} images are damaged: {shown}",
                key=key,
                remedy="remove or replace them, or set data.damaged=skip",
            )
        self.skipped += damaged
        self.notices.append(
            f"WARNING: {len(damaged)} of {len(samples)} images are damaged and left out: {damaged[0].place}"
            f" {damaged[0].problem}{', ...' if len(damaged) > 1 else ''}; skipped.csv in the run folder lists them"
        )
        if is_damaged.all():
            raise UserError("all images are damaged", key=key, remedy="set a folder of images that can be decoded")
        return samples.select(np.flatnonzero(~is_damaged))

    def _check_captions(self, samples: TableSamples, path: str, key: str) -> None:
        without = np.flatnonzero(samples.text_counts("captions") == 0)
        if len(without) and samples.rules.prompt is None:
            remedy = 'set data.prompt="a photo of ...", or add a .txt file next to each image'
            if key == "data.class_path":
                remedy = 'set data.class_prompt="a photo of a dog", or add a .txt file next to each image'
            elif self.templates:
                remedy = 'set data.prompt to the new token, as in data.prompt="<my_cat>"; data.templates adds the rest'
            raise UserError(
                f"{len(without)} of {len(samples)} images have no caption, the first is {samples[int(without[0])]}",
                key=key,
                remedy=kohya_parent(Path(path).expanduser().absolute(), key) or remedy,
            )
        self._uses_prompt = self._uses_prompt or (len(without) > 0 and key != "data.class_path")

    def _note_captions(self) -> None:
        if self.prompt not in (None, self.trigger) and not self._uses_prompt:
            self.notices.append("WARNING: data.prompt is not used: all images have captions")

    def _check_masks(self, samples: TableSamples) -> None:
        """Check that there is a mask of each image's size, if masks are files.

        Raises:
            UserError: a mask is missing, damaged, or has another size.
        """
        if self.mask != "file":
            return
        for index in np.flatnonzero(samples.has_bad_mask())[:1].tolist():
            image, mask = samples.image(index), samples.mask_image(index)
            if mask is None:
                raise UserError(
                    f"{samples[index]} has no mask",
                    key="data.mask",
                    remedy=f"add {image.place.file.stem}.mask.png next to it, white where the loss counts",
                )
            if mask.problem is not None:
                raise UserError(f"{mask.place} {mask.problem}", key="data.mask", remedy="remove or replace it")
            raise UserError(
                f"{mask.place} is {mask.width}x{mask.height} pixels but its image is {image.width}x{image.height}",
                key="data.mask",
                remedy="save the mask at the size of the image",
            )
        for index in samples.indices_of("blank", "mask")[:_SHOWN].tolist():
            mask = samples.mask_image(index)
            assert mask is not None
            self.notices.append(
                f"WARNING: {mask.place} is black everywhere, so its image does not contribute to the loss"
            )


@dataclass(kw_only=True, eq=False)
class Folder(FileImages):
    """Data module for a folder of images; :func:`sdtune.data.folder.list_image_folder` documents the captions.

    Each image is read once, and again when its size or modification time changes.

    Args:
        path: folder of the images.
        rehash: read all images again, also those that seem unchanged.
    """

    rehash: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.name = Path(self.path).expanduser().resolve().name

    def _roles(self, key: str) -> dict[Path, str]:
        """Folders that settings other than ``key`` use: resolved path -> config key."""
        paths = {
            "data.path": self.path,
            "data.class_path": self.class_path,
            "data.validation_path": self.validation_path,
            "data.control.path": self._maps,
        }
        return {Path(path).expanduser().resolve(): role for role, path in paths.items() if path and role != key}

    @property
    def _maps(self) -> Path | None:
        """Folder of control maps."""
        return self.control.path if isinstance(self.control, Paired) else None

    def table(self, path: str, key: str, count: int | None) -> MappedTable:
        maps = None if key == "data.class_path" else self._maps
        table = folder_table(path, key, self._roles(key), maps, count, rehash=self.rehash)
        if not self.captions.sentences and (second := np.flatnonzero(table.text_counts("sentences")))[:1].size:
            raise UserError(
                f"{table.row(int(second[0])).image.place} has two captions, a .txt and a .caption file",
                key=key,
                remedy="remove one, or set data.captions.kind=tags data.captions.sentences=0.5 to use both",
            )
        return table


@dataclass(kw_only=True, eq=False)
class Table(FileImages):
    """Data module for a table of samples, which ``sdtune index`` has written.

    Args:
        path: the table, a file.
    """

    def table(self, path: str, key: str, count: int | None) -> MappedTable:
        file = Path(path).expanduser().absolute()
        if file.is_dir():
            if key == "data.path":
                raise UserError(
                    f"{file} is a folder", key=key, remedy="use data=folder, or set the file of sdtune index"
                )
            return folder_table(file, key, None, None, count)
        return open_table(file, key)
