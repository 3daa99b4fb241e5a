"""Protocols of a captioned image and of a sequence of them, and the cache keys of latents and text embeddings."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Protocol, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sdtune.data.captions import CaptionRules, CaptionTexts
from sdtune.images.files import CENTER


class Sample(Protocol):
    """Image with its caption.

    ``size`` is (width, height) in pixels; ``repeats``, at least 1, is the number of uses per epoch.
    """

    @property
    def caption(self) -> str: ...
    @property
    def size(self) -> tuple[int, int]: ...
    @property
    def repeats(self) -> int: ...

    def content(self) -> str:
        """Identifier of the image's content, part of the cache key of its latents."""

    def pixels(self, size: tuple[int, int], offset: tuple[float, float], flip: bool) -> np.ndarray:
        """Pixels of the image, uint8 [H, W, 3], scaled and cropped as :func:`sdtune.images.files.resize_and_crop` does.

        Args:
            size: (width, height) in pixels.
            offset: (x, y) in [0, 1], the fraction of the excess that is cropped at the left and at the top.
            flip: mirror left and right.
        """


class Masked(Sample, Protocol):
    """Sample with a loss mask."""

    def mask(self, size: tuple[int, int], offset: tuple[float, float], flip: bool) -> np.ndarray:
        """Loss mask uint8 [H, W], 255 where the loss counts, scaled and cropped like the image."""


class SampleSequence(Sequence[Sample], ABC):
    """Sequence of samples whose numbers are arrays, so that a million samples need no million objects.

    Args:
        rules: from captions to prompts.
    """

    rules: CaptionRules

    @property
    @abstractmethod
    def sizes(self) -> npt.NDArray[np.int64]:
        """(width, height) in pixels of each sample, int64 [N, 2]."""

    @property
    @abstractmethod
    def repeats(self) -> npt.NDArray[np.int64]:
        """Repeats of each sample, int64 [N]."""

    def control_sizes(self) -> npt.NDArray[np.int64] | None:
        """(width, height) in pixels of each control map that the data names, int64 [N, 2]; 0 for none or a damaged one.

        None if the data has no files.
        """
        return None

    @abstractmethod
    def texts(self, index: int) -> CaptionTexts:
        """Captions of sample ``index``."""

    @abstractmethod
    def every_texts(self) -> Iterator[CaptionTexts]:
        """Captions of all samples, in order."""

    @abstractmethod
    def select(self, indices: npt.NDArray[np.int64]) -> SampleSequence:
        """The samples of ``indices``, in this order."""

    @abstractmethod
    def update_digest(
        self, update: Callable[[bytes], object], mask_sizes: npt.NDArray[np.int32] | None, *, maps: bool
    ) -> None:
        """Hash contents, captions and repeats.

        Args:
            update: receives bytes.
            mask_sizes: training size (width, height) of each sample, int32 [N, 2], if masks are used; else None.
            maps: whether control maps that are files are used.
        """

    @abstractmethod
    def __getitem__(self, index: int) -> Sample:  # type: ignore[override]
        ...

    def __iter__(self) -> Iterator[Sample]:
        return (self[index] for index in range(len(self)))

    def first(self, count: int | None) -> SampleSequence:
        """The first ``count`` samples; all for None."""
        return self if count is None or count >= len(self) else self.select(np.arange(count))

    def captions(self) -> Iterator[str]:
        """The caption of each sample without draws, in order."""
        return (self.rules.fixed(texts) for texts in self.every_texts())


class SampleList(SampleSequence):
    """SampleSequence in a list.

    Args:
        samples: the samples; with prior preservation, their repeats are those of the class images.
        rules: from captions to prompts.
    """

    def __init__(self, samples: Sequence[Sample], rules: CaptionRules | None = None) -> None:
        self._samples, self.rules = samples, rules or CaptionRules()

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> Sample:  # type: ignore[override]
        return self._samples[index]

    @cached_property
    def sizes(self) -> npt.NDArray[np.int64]:
        return np.array([sample.size for sample in self._samples], np.int64).reshape(-1, 2)

    @cached_property
    def repeats(self) -> npt.NDArray[np.int64]:
        return np.array([sample.repeats for sample in self._samples], np.int64)

    def texts(self, index: int) -> CaptionTexts:
        return CaptionTexts((self._samples[index].caption,))

    def every_texts(self) -> Iterator[CaptionTexts]:
        return (CaptionTexts((sample.caption,)) for sample in self._samples)

    def select(self, indices: npt.NDArray[np.int64]) -> SampleList:
        return SampleList([self._samples[int(index)] for index in indices], self.rules)

    def update_digest(
        self, update: Callable[[bytes], object], mask_sizes: npt.NDArray[np.int32] | None, *, maps: bool
    ) -> None:
        for number, sample in enumerate(self._samples):
            caption = self.rules.fixed(CaptionTexts((sample.caption,)))
            update(f"{sample.content()}|{sample.repeats}|{caption}\n".encode())
            if mask_sizes is not None:
                width, height = map(int, mask_sizes[number])
                update(masked(sample).mask((width, height), CENTER, False).tobytes())


def masked(sample: Sample) -> Masked:
    """``sample``, which has a mask."""
    assert hasattr(sample, "mask"), sample
    return cast(Masked, sample)


def to_tensor(pixels: np.ndarray) -> Tensor:
    """Convert uint8 [H, W, 3] to float32 [3, H, W] in [-1, 1]."""
    return torch.from_numpy(pixels).permute(2, 0, 1).float() / 127.5 - 1


def latent_key(sample: Sample, size: tuple[int, int], flip: bool) -> str:
    """Cache key of the latent moments of ``sample`` at ``size`` (width, height)."""
    return f"{sample.content()}|{size[0]}x{size[1]}|centre|{'flip' if flip else 'plain'}"
