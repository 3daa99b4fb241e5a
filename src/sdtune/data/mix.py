"""Data module for a mix of several sources of images, each with its own settings."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from sdtune.data.captions import CaptionTexts
from sdtune.data.control.base import Control
from sdtune.data.datamodule import CacheInputs, ImageDataModule
from sdtune.data.entries import Resolutions
from sdtune.data.samples import Sample, SampleList, SampleSequence
from sdtune.errors import UserError


class JoinedSamples(SampleSequence):
    """The samples of several sources, one after the other.

    Args:
        parts: samples of each source.
    """

    def __init__(self, parts: Sequence[SampleSequence]) -> None:
        self._parts, self.rules = parts, parts[0].rules
        self._firsts = np.cumsum([0, *(len(part) for part in parts)])

    def __len__(self) -> int:
        return int(self._firsts[-1])

    def _place(self, index: int) -> tuple[SampleSequence, int]:
        part = int(np.searchsorted(self._firsts, index, side="right")) - 1
        return self._parts[part], index - int(self._firsts[part])

    def __getitem__(self, index: int) -> Sample:  # type: ignore[override]
        samples, own_index = self._place(index)
        return samples[own_index]

    @cached_property
    def sizes(self) -> npt.NDArray[np.int64]:
        return np.concatenate([part.sizes for part in self._parts])

    @cached_property
    def repeats(self) -> npt.NDArray[np.int64]:
        return np.concatenate([part.repeats for part in self._parts])

    def texts(self, index: int) -> CaptionTexts:
        samples, own_index = self._place(index)
        return samples.texts(own_index)

    def every_texts(self) -> Iterator[CaptionTexts]:
        return itertools.chain.from_iterable(part.every_texts() for part in self._parts)

    def captions(self) -> Iterator[str]:
        return itertools.chain.from_iterable(part.captions() for part in self._parts)

    def select(self, indices: npt.NDArray[np.int64]) -> SampleList:
        return SampleList([self[int(index)] for index in indices])

    def update_digest(
        self, update: Callable[[bytes], object], mask_sizes: npt.NDArray[np.int32] | None, *, maps: bool
    ) -> None:
        for part in self._parts:
            update(f"{len(part)}\n".encode())
            part.update_digest(update, mask_sizes, maps=maps)


@dataclass(kw_only=True, eq=False)
class Mix(ImageDataModule):
    """Data module for several sources.

    In an epoch, each image of a source is used as often as its repeats say, or the images of the source are used as
    often as its ``weight`` asks: ``weight`` times the images of the largest source. A fractional part is filled with
    images that are drawn for each epoch.

    Args:
        sources: the sources by name, each a data module; of their settings, those of the batch and of the caches have
            no effect.
    """

    sources: Mapping[str, ImageDataModule]

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.sources:
            raise UserError("there are no sources", key="data.sources", remedy="set data.sources.NAME.path=DIR")
        self.name = "-".join(self.sources)[:_LONGEST_NAME]
        # They apply to each source, which has them among its own settings.
        self.limit = self.validation_limit = None
        for name, source in self.sources.items():
            key = f"data.sources.{name}"
            if not re.fullmatch(r"\w[\w-]*", name):
                raise UserError(f"{name!r} is not a name", key=key, remedy="use letters, digits, _ and -")
            if isinstance(source, Mix):
                raise UserError("is a mix itself", key=key, remedy="list its sources here")
            if source.weight is not None and getattr(source, "repeats", 1) != 1:
                raise UserError("cannot be combined with repeats", key=f"{key}.weight", remedy="remove one of the two")
        self._check_controls()

    def _check_controls(self) -> None:
        controls = {name: source.control for name, source in self.sources.items()}
        kinds = {_kind(control) for control in controls.values()}
        if len(kinds) > 1:
            without = next((name for name, control in controls.items() if control is None), None)
            different = "sources with and without control maps" if without else "sources with different control maps"
            name = without or next(iter(controls))
            raise UserError(
                f"{different} cannot be mixed",
                key=f"data.sources.{name}.control",
                remedy="set the same for all sources",
            )
        self.control = next(iter(controls.values()))

    @property
    def parts(self) -> dict[str, ImageDataModule]:
        return dict(self.sources)

    @property
    def has_prior(self) -> bool:
        return any(source.has_prior for source in self.sources.values())

    def open(self, side: int, factor: int) -> None:
        for name, source in self.sources.items():
            source.seed = self.seed
            with errors_of_source(name):
                source.open(side, factor)
        super().open(side, factor)

    def _set_resolutions(self, side: int) -> None:
        opened = [source.resolutions for source in self.sources.values()]
        steps = dict(pair for r in opened for pair in zip(r.sides, r.steps, strict=True))
        self.resolutions = Resolutions(tuple(sorted(steps)), tuple(steps[side] for side in sorted(steps)))

    def _open_controls(self) -> None:
        """The sources have opened theirs."""

    def _check_class_captions(self) -> None:
        """The sources have checked theirs."""

    def read(self) -> tuple[SampleSequence, SampleSequence]:
        for name, source in self.sources.items():
            self.notices += [_of_source(name, line) for line in source.notices]
            self.skipped += source.skipped
        sources = self.sources.values()
        return JoinedSamples([s.train for s in sources]), JoinedSamples([s.held_out for s in sources])

    def trigger_words(self) -> str | None:
        words = dict.fromkeys(word for source in self.sources.values() if (word := source.trigger_words()))
        return ", ".join(words) or None

    def generate_class_images(self, inputs: CacheInputs) -> None:
        raise AssertionError("each source generates its own")


_LONGEST_NAME = 60


def _kind(control: Control | None) -> str:
    """Class and settings of control maps, without the folder of the maps."""
    public = {} if control is None else {k: v for k, v in vars(control).items() if k != "path" and k[0] != "_"}
    return f"{type(control).__name__} {public}"


def _of_source(name: str, line: str) -> str:
    """``line`` of a data summary, with the name of its source."""
    warning = "WARNING: " if line.startswith("WARNING: ") else ""
    return f"{warning}source {name}: {line.removeprefix(warning)}"


@contextmanager
def errors_of_source(name: str) -> Iterator[None]:
    """Context manager that names a source in the settings of a :class:`~sdtune.errors.UserError`."""

    def renamed(text: str | None) -> str | None:
        return None if text is None else _OF_SOURCE.sub(f"data.sources.{name}.", text)

    try:
        yield
    except UserError as error:
        raise UserError(error.message, key=renamed(error.key), remedy=renamed(error.remedy)) from error


_SETTINGS = (
    *("path", "prompt", "trigger", "repeats", "hold_out", "validation_path", "validation_limit", "damaged", "rehash"),
    *("class_path", "class_prompt", "class_images", "prior_weight", "mask", "control", "captions", "templates"),
    *("resolution", "limit", "flip", "random_crop", "caption_dropout", "subject", "token", "images", "objects"),
)
_OF_SOURCE = re.compile(rf"(?<![\w/.])data\.(?=({'|'.join(_SETTINGS)})\b)")
"""Beginning of the name of a setting of a source; not a file name such as ``data.old/path``."""
