"""The data module of every method: pictures with captions, in buckets, with caches and a fixed order."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Protocol

import numpy as np
import pytorch_lightning as pl
import torch
from annotated_types import Ge, Gt, Interval
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from sdtune.data.buckets import assign
from sdtune.data.cache import TensorCache, share
from sdtune.data.control import CENTRE, Control, as_map
from sdtune.data.order import Draw, FixedBatches, MicroBatches, Order
from sdtune.data.progress import bar
from sdtune.data.workers import leave_signals
from sdtune.randomness import generator

_ENCODED_PIXELS = 4 * 512 * 512  # of one call of the VAE's encoder, which keeps its activations within about 8 GB

VALIDATION_RUNGS = 8
"""Timesteps at which each held-out picture is looked at."""

Batch = dict[str, Any]
"""prompts: list[str]; step: int; positions: list[int] (no tensor: read on
a device, it would make the step wait); and either pixels (float32 [B, 3, H, W] in [-1, 1]) or moments
(float32 [B, 2C, h, w]); text (float32 [B, L, D]) where text states are cached; control (float32 [B, 3, H, W] in
[0, 1]) where the data has control maps."""


class Sample(Protocol):
    """A picture with its caption; ``size`` is (width, height) in pixels."""

    @property
    def caption(self) -> str: ...
    @property
    def size(self) -> tuple[int, int]: ...
    @property
    def repeats(self) -> int: ...

    def content(self) -> str:
        """A name for the picture's content, by which its latents are cached."""

    def pixels(self, size: tuple[int, int], offset: tuple[float, float], flip: bool) -> np.ndarray:
        """uint8 [H, W, 3], scaled to cover ``size`` (width, height) and cropped at ``offset`` (shares of the room)."""


@dataclass(frozen=True)
class View:
    """A sample as it is cached: scaled and cropped at the centre to ``size`` (width, height), mirrored or not."""

    sample: Sample
    size: tuple[int, int]
    flip: bool

    def tensor(self) -> Tensor:
        return _tensor(self.sample.pixels(self.size, CENTRE, self.flip))

    def __str__(self) -> str:
        return str(self.sample)


@dataclass(frozen=True)
class Encoders:
    """What frozen parts of a backbone may encode once for all: None where a part is trained."""

    images: Callable[[Tensor], Tensor] | None
    images_hash: str
    text: Callable[[Sequence[str]], Tensor] | None
    text_hash: str
    cache: Path
    rank: int = 0
    processes: int = 1


@dataclass(kw_only=True, eq=False)
class PictureData(pl.LightningDataModule, ABC):
    """Pictures with captions.

    Args:
        batch_size: samples an optimizer step, over all processes and accumulation steps.
        resolution: side in pixels of a square picture of the area that buckets keep to; the backbone's own if None.
        caption_dropout: share of samples that train without their caption (Ho & Salimans 2022, section 3.2).
        flip: mirror half of the samples.
        random_crop: crop at random instead of at the centre; not with cached latents.
        cache_latents: encode each picture once (moments, not samples) where the VAE is frozen.
        cache_text: encode each caption once where the text encoder is frozen.
        workers: processes that load pictures.
        limit: train on so many of the pictures, the first ones; on all if None.
        control: where the pictures' control maps come from.
        seed: decides order, crops, flips and dropout; the run's seed.
    """

    batch_size: Annotated[int, Ge(1)] = 2
    resolution: Annotated[int, Gt(0)] | None = None
    caption_dropout: Annotated[float, Interval(ge=0, le=1)] = 0.0
    flip: bool = False
    random_crop: bool = False
    cache_latents: bool = True
    cache_text: bool = True
    workers: Annotated[int, Ge(0)] = 0
    limit: Annotated[int, Ge(1)] | None = None
    control: Control | None = None
    seed: int = 0

    factor: int = field(default=8, init=False)
    _train: Sequence[Sample] = field(default=(), init=False)
    _held_out: Sequence[Sample] = field(default=(), init=False)
    _latents: TensorCache | None = field(default=None, init=False)
    _text: TensorCache | None = field(default=None, init=False)
    _began_with: str = field(default="", init=False)

    def __post_init__(self) -> None:
        super().__init__()
        if self.random_crop and self.cache_latents:
            raise ValueError("data.random_crop: a cached latent has one crop; set data.cache_latents=false as well")

    def __getstate__(self) -> dict[str, Any]:
        """For loader processes: without the trainer, which cannot be pickled and is not needed there."""
        return {**self.__dict__, "trainer": None}

    # --- what a source says

    name: str = field(default="pictures", init=False)
    """Names a run's files where the user names none."""

    keep: str = field(default="", init=False)
    """What a dropped caption keeps: the trigger."""

    @abstractmethod
    def read(self) -> tuple[Sequence[Sample], Sequence[Sample]]:
        """The training samples and those held out for validation; ValueError where the data is not usable."""

    # --- what is made of it

    def open(self, side: int, factor: int) -> None:
        """Read the source, for a backbone of ``side`` pixels whose VAE shrinks by ``factor``. Loads no weights."""
        if self._train:
            return
        self.resolution = self.resolution or side
        self.factor = factor
        if self.resolution % factor:
            raise ValueError(f"data.resolution: {self.resolution} is not a multiple of {factor}, the VAE's factor")
        train, self._held_out = self.read()
        self._train = train[: self.limit]
        if self.control is not None:
            self.control.open((*self._train, *self._held_out))

    @property
    def train(self) -> Sequence[Sample]:
        """The training samples, once :meth:`open` has read them."""
        return self._train

    @property
    def held_out(self) -> Sequence[Sample]:
        """The samples held out for validation."""
        return self._held_out

    @property
    def bucket_step(self) -> int:
        """Pixels between bucket sides: 64 as the field has it, less where the resolution is small."""
        assert self.resolution is not None
        return min(64, max(self.factor * 8, self.factor * (self.resolution // self.factor // 8)))

    def bucket(self, sample: Sample) -> tuple[int, int]:
        """The (width, height) that ``sample`` is trained at."""
        assert self.resolution is not None
        return assign(sample.size, self.resolution, self.bucket_step, name=str(sample))

    def buckets(self, samples: Sequence[Sample]) -> dict[tuple[int, int], tuple[int, ...]]:
        """Entries by (width, height), repeats counted."""
        found: dict[tuple[int, int], list[int]] = {}
        for entry, sample in enumerate(samples):
            found.setdefault(self.bucket(sample), []).extend([entry] * sample.repeats)
        return {size: tuple(entries) for size, entries in sorted(found.items())}

    def order(self) -> Order:
        """The global batches of the training samples."""
        return Order(tuple(self.buckets(self.train).values()), self.batch_size, self.seed)

    def captions(self) -> list[str]:
        """Every prompt that training may use, each once, the empty one for dropout included."""
        found = dict.fromkeys(s.caption for s in (*self.train, *self.held_out))
        return [*found, *([self.keep] if self.caption_dropout and self.keep not in found else [])]

    # --- checkpoints

    @cached_property
    def fingerprint(self) -> str:
        """Of what is trained on: pictures by content, captions, repeats, order."""
        digest = hashlib.sha256()
        for sample in self.train:
            digest.update(f"{sample.content()}|{sample.repeats}|{sample.caption}\n".encode())
            if self.control is not None:
                digest.update(self.control.content(sample).encode())
        return digest.hexdigest()

    def state_dict(self) -> dict[str, Any]:
        return {"fingerprint": self.fingerprint}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._began_with = state_dict["fingerprint"]

    # --- caches

    def prepare(self, encoders: Encoders) -> None:
        """Fill the caches that these encoders and settings allow; the data is encoded anew each step otherwise.

        Raises:
            ValueError: a resumed run's pictures or captions are not those that it began with.
        """
        if self._began_with and self._began_with != self.fingerprint:
            raise ValueError(
                "resume: the pictures, captions or repeats have changed since the run began; put them back, or start"
                " a new run"
            )
        if self.control is not None:
            self.control.prepare((*self.train, *self.held_out), encoders.rank, encoders.processes)
        if self.cache_latents and encoders.images is not None:
            self._latents = TensorCache(encoders.cache / "latents" / encoders.images_hash)
            self._fill_latents(self._latents, encoders)
        if self.cache_text and encoders.text is not None:
            self._text = TensorCache(encoders.cache / "text" / encoders.text_hash)
            prompts = {_text_key(prompt): prompt for prompt in self.captions()}
            mine = {key: prompts[key] for key in share(prompts, encoders.rank, encoders.processes)}
            with bar("Encoding captions", sum(key not in self._text for key in mine)) as progress:
                self._text.fill(mine, encoders.text, batch_size=64, progress=progress)

    def _fill_latents(self, cache: TensorCache, encoders: Encoders) -> None:
        assert encoders.images is not None
        encode_images = encoders.images
        samples = (*self.train, *self.held_out)
        views = {
            _latent_key(sample, self.bucket(sample), flip): View(sample, self.bucket(sample), flip)
            for sample in samples
            for flip in ((False, True) if self.flip else (False,))
        }
        for size in sorted({view.size for view in views.values()}):
            keys = [key for key, view in views.items() if view.size == size]
            mine = {key: views[key] for key in share(keys, encoders.rank, encoders.processes)}
            with bar(f"Encoding pictures at {size[0]}x{size[1]}", sum(key not in cache for key in mine)) as progress:
                cache.fill(
                    mine,
                    lambda batch: encode_images(torch.stack([view.tensor() for view in batch])),
                    batch_size=max(1, min(64, _ENCODED_PIXELS // (size[0] * size[1]))),
                    progress=progress,
                )

    # --- loaders

    def train_dataloader(self) -> DataLoader[Batch]:
        trainer = self.trainer
        assert trainer is not None
        accumulation = trainer.accumulate_grad_batches
        sampler = MicroBatches(
            self.order(),
            steps=trainer.max_steps,
            accumulation=accumulation,
            rank=trainer.global_rank,
            processes=trainer.world_size,
            start=lambda: trainer.global_step,
        )
        return self._loader(_Pictures(self, self.train, training=True), sampler)

    def val_dataloader(self) -> DataLoader[Batch] | list[Any]:
        if not self.held_out:
            return []
        trainer = self.trainer
        assert trainer is not None
        micro = max(1, self.batch_size // (trainer.accumulate_grad_batches * trainer.world_size))
        sampler = FixedBatches(list(self.buckets(self.held_out).values()), micro, VALIDATION_RUNGS)
        return self._loader(_Pictures(self, self.held_out, training=False), sampler)

    def _loader(self, dataset: Dataset[Any], sampler: Any) -> DataLoader[Batch]:
        return DataLoader(
            dataset,
            batch_sampler=sampler,
            num_workers=self.workers,
            collate_fn=_collate,
            worker_init_fn=leave_signals,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=self.workers > 0,
        )


class _Pictures(Dataset[dict[str, Any]]):
    def __init__(self, data: PictureData, samples: Sequence[Sample], training: bool) -> None:
        self.data, self.samples, self.training = data, samples, training

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, draw: Draw) -> dict[str, Any]:
        data, sample = self.data, self.samples[draw.entry]
        prompt, flip, offset = sample.caption, False, CENTRE
        if self.training:
            rng = generator(data.seed, "picture", draw.step, draw.position)
            dropped, flipped, x, y = rng.random(4)
            prompt = data.keep if dropped < data.caption_dropout else prompt
            flip = data.flip and flipped < 0.5
            offset = (float(x), float(y)) if data.random_crop else offset
        item: dict[str, Any] = {"prompt": prompt, "step": draw.step, "position": draw.position}
        size = data.bucket(sample)
        if data._latents is not None:
            item["moments"] = data._latents.get(_latent_key(sample, size, flip))
        else:
            item["pixels"] = _tensor(sample.pixels(size, offset, flip))
        if data.control is not None:
            item["control"] = as_map(data.control.map(sample, size, offset, flip))
        if data._text is not None:
            item["text"] = data._text.get(_text_key(prompt))
        return item


def _collate(items: list[dict[str, Any]]) -> Batch:
    batch: Batch = {
        "prompts": [item["prompt"] for item in items],
        "step": items[0]["step"],
        "positions": [item["position"] for item in items],
    }
    for key in ("pixels", "moments", "text", "control"):
        if key in items[0]:
            batch[key] = torch.stack([item[key] for item in items])
    return batch


def _tensor(pixels: np.ndarray) -> Tensor:
    return torch.from_numpy(pixels).permute(2, 0, 1).float() / 127.5 - 1


def _latent_key(sample: Sample, size: tuple[int, int], flip: bool) -> str:
    return f"{sample.content()}|{size[0]}x{size[1]}|centre|{'flip' if flip else 'plain'}"


def _text_key(prompt: str) -> str:
    return f"text|{prompt}"
