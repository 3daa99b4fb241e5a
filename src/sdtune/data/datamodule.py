"""LightningDataModule for captioned images: aspect-ratio buckets, caches, deterministic order."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Annotated, Any, cast

import pytorch_lightning as pl
import torch
from annotated_types import Ge, Gt, Interval, MinLen
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from sdtune.data.buckets import assign
from sdtune.data.cache import TensorCache, share
from sdtune.data.control.base import Control
from sdtune.data.dataset import Batch, ImageDataset, RowSettings, begin_worker, collate
from sdtune.data.order import FixedBatches, MicroBatches, Order
from sdtune.data.prior import DrawImages, class_images, draw_missing
from sdtune.data.samples import Masked, Sample, View, latent_key, text_key
from sdtune.data.templates import TemplateSet, templates
from sdtune.errors import UserError
from sdtune.images.files import CENTRE
from sdtune.progress import bar


def at_once(pixels: int, width: int, height: int) -> int:
    """How many images ``pixels`` hold, but one at least and 64 at most."""
    return max(1, min(64, pixels // (width * height)))


def encoded_at_once(width: int, height: int, kind: str) -> int:
    """How many images go through the VAE's encoder at once on a device of ``kind``.

    A CPU takes a quarter longer for each of four of 256x256 at once than for one; elsewhere it is four of 512x512,
    which keeps activations within about 8 GB.
    """
    return at_once(256 * 256 if kind == "cpu" else 4 * 512 * 512, width, height)


VALIDATION_TIMESTEPS = 8
"""Timesteps at which each held-out image is looked at."""


@dataclass(frozen=True)
class Encoders:
    """What frozen parts of a backbone may encode once for all: None where a part is trained."""

    images: Callable[[Tensor], Tensor] | None
    images_hash: str
    text: Callable[[Sequence[str]], Tensor] | None
    text_hash: str
    cache: Path
    draw: DrawImages | None = None
    """The model before training, for images of the class."""
    draw_hash: str = ""
    device: torch.device | None = None
    rank: int = 0
    processes: int = 1


@dataclass(kw_only=True, eq=False)
class ImageDataModule(pl.LightningDataModule, ABC):
    """Images with captions.

    Args:
        batch_size: samples per optimizer step, over all processes and accumulation steps.
        resolution: side in pixels of a square image of the area that buckets keep to; the backbone's own if None.
        caption_dropout: share of samples that train without their caption (Ho & Salimans 2022, section 3.2).
        flip: mirror half of the samples.
        random_crop: crop at random instead of at the centre; not with cached latents.
        cache_latents: encode each image once (moments, not samples) where the VAE is frozen.
        cache_text: encode each caption once where the text encoder is frozen.
        workers: processes that load images.
        limit: train on so many of the images, the first ones; on all if None.
        templates: texts around the captions, another one each time: Textual Inversion's family ``object`` or
            ``style``, or one's own with ``{}`` where the caption goes.
        masked: weight the loss by each image's mask.
        class_prompt: prompt for the class of the subject ("a photo of a dog"), or several that take turns: with it,
            images of the class train beside those of the subject, in pairs, and a pair counts as one sample.
        class_path: a folder of such images; the model draws them before training if None.
        class_images: how many it draws.
        prior_weight: lambda of L = L_instance + lambda L_class; 0 leaves the class out.
        control: where the images' control maps come from.
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
    templates: TemplateSet | Sequence[str] | None = None
    masked: bool = False
    class_prompt: str | Annotated[list[str], MinLen(1)] | None = None
    class_path: str | None = None
    class_images: Annotated[int, Ge(1)] = 200
    prior_weight: Annotated[float, Ge(0)] = 1.0
    control: Control | None = None
    seed: int = 0

    factor: int = field(default=8, init=False)
    _asked: int | None = field(default=None, init=False)
    _opened: tuple[int, int] | None = field(default=None, init=False)
    _train: Sequence[Sample] = field(default=(), init=False)
    _held_out: Sequence[Sample] = field(default=(), init=False)
    latent_cache: TensorCache | None = field(default=None, init=False)
    text_cache: TensorCache | None = field(default=None, init=False)
    texts: Sequence[str] = field(default=(), init=False)
    _began_with: str = field(default="", init=False)
    class_samples: Sequence[Sample] = field(default=(), init=False)

    def __post_init__(self) -> None:
        super().__init__()
        if self.random_crop and self.cache_latents:
            raise UserError(
                "a cached latent has one crop", key="data.random_crop", remedy="set data.cache_latents=false as well"
            )
        if self.control is not None and self.has_prior:
            raise UserError(
                "class images have no control maps", key="data.class_prompt", remedy="leave them or the maps out"
            )
        if self.class_path is not None and not isinstance(self.class_prompt, str | None):
            raise UserError(
                "images of data.class_path that have no caption share one", key="data.class_prompt", remedy="give one"
            )
        self.texts = templates(self.templates)
        self._asked = self.resolution

    # --- what a source says

    name: str = field(default="images", init=False)
    """Names a run's files where the user names none."""

    keep: str = field(default="", init=False)
    """What a dropped caption keeps: the trigger."""

    @abstractmethod
    def read(self) -> tuple[Sequence[Sample], Sequence[Sample]]:
        """The training samples and those held out for validation; UserError where the data is not usable."""

    def read_class(self, path: str) -> Sequence[Sample]:
        """The samples in a folder of class images."""
        raise UserError(
            f"{type(self).__name__} data draws its class images", key="data.class_path", remedy=f"leave {path} out"
        )

    # --- what is made of it

    def open(self, side: int, factor: int) -> None:
        """Read the source, for a backbone of ``side`` pixels whose VAE shrinks by ``factor``. Loads no weights."""
        if self._opened == (side, factor):
            return
        # With another backbone than before, its side counts where none was asked for.
        self.resolution = self._asked or side
        self._opened, self.factor = (side, factor), factor
        if self.resolution % factor:
            raise UserError(f"{self.resolution} is not a multiple of {factor}, the VAE's factor", key="data.resolution")
        train, self._held_out = self.read()
        self._train = train[: self.limit]
        if self.control is not None:
            self.control.open((*self._train, *self._held_out))
        if self.has_prior and self.class_path is not None:
            self.class_samples = self.read_class(self.class_path)
        if self.has_prior:
            same = next((s.caption for s in self._train if s.caption in self.class_prompts), None)
            if same is not None:
                raise UserError(
                    f"{same!r} is a caption of the subject too, and the two would pull the same words apart",
                    key="data.class_prompt",
                    remedy="put a rare word into the subject's",
                )

    @property
    def has_prior(self) -> bool:
        """Whether images of the class train beside those of the subject."""
        return self.prior_weight > 0 and (self.class_prompt is not None or self.class_path is not None)

    @property
    def class_prompts(self) -> tuple[str, ...]:
        """The prompts of the class, by turns; empty where there is none."""
        return (self.class_prompt,) if isinstance(self.class_prompt, str) else tuple(self.class_prompt or ())

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

    def shown(self) -> list[str]:
        """Every prompt of the training images themselves, each once."""
        return list(dict.fromkeys(t.replace("{}", s.caption) for s in self.train for t in self.texts))

    def captions(self) -> list[str]:
        """Every prompt that training may use, each once, the empty one for dropout included."""
        found = dict.fromkeys(self.shown())
        found |= dict.fromkeys(self.texts[0].replace("{}", s.caption) for s in self.held_out)
        found |= dict.fromkeys(s.caption for s in self.class_samples)
        if self.caption_dropout:
            # An image of the class keeps nothing.
            found |= dict.fromkeys([self.keep, *([""] if self.has_prior else [])])
        return list(found)

    # --- checkpoints

    @cached_property
    def fingerprint(self) -> str:
        """Of what is trained and validated on: images, masks and maps by content, captions, repeats, order."""
        digest = hashlib.sha256()
        for sample in (*self.train, *self.held_out):
            digest.update(f"{sample.content()}|{sample.repeats}|{sample.caption}\n".encode())
            if self.control is not None:
                digest.update(self.control.content(sample).encode())
            if self.masked:
                digest.update(cast(Masked, sample).mask(self.bucket(sample), CENTRE, False).tobytes())
        if self.class_path is not None:
            for sample in self.class_samples:
                digest.update(f"class|{sample.content()}|{sample.caption}\n".encode())
        return digest.hexdigest()

    def state_dict(self) -> dict[str, Any]:
        return {"fingerprint": self.fingerprint}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._began_with = state_dict["fingerprint"]

    # --- caches

    def draw_class(self, encoders: Encoders) -> None:
        """Have the model draw this process's share of the class images that are wanted and not there yet."""
        if not self.has_prior or self.class_path is not None:
            return
        assert self.class_prompt is not None
        assert self.resolution is not None
        folder = encoders.cache / "class" / encoders.draw_hash
        images = class_images(folder, self.class_prompts, self.class_images, self.resolution)
        if encoders.draw is not None:
            draw_missing(images, encoders.draw, encoders.rank, encoders.processes)
        self.class_samples = images

    def prepare(self, encoders: Encoders) -> None:
        """Fill the caches that these encoders and settings allow; the data is encoded anew each step otherwise.

        Raises:
            UserError: a resumed run's images or captions are not those that it began with.
        """
        if self._began_with and self._began_with != self.fingerprint:
            raise UserError(
                "the images, masks, captions or repeats have changed since the run began",
                key="resume",
                remedy="put them back, or start a new run",
            )
        # Another model may have used this data before, with other parts open.
        self.latent_cache = self.text_cache = None
        if self.control is not None:
            self.control.prepare((*self.train, *self.held_out), encoders.rank, encoders.processes, encoders.device)
        if self.cache_latents and encoders.images is not None:
            self.latent_cache = TensorCache(encoders.cache / "latents" / encoders.images_hash)
            self._fill_latents(self.latent_cache, encoders)
        if self.cache_text and encoders.text is not None:
            self.text_cache = TensorCache(encoders.cache / "text" / encoders.text_hash)
            prompts = {text_key(prompt): prompt for prompt in self.captions()}
            mine = {key: prompts[key] for key in share(prompts, encoders.rank, encoders.processes)}
            with bar("Encoding captions", sum(key not in self.text_cache for key in mine)) as progress:
                self.text_cache.fill(mine, encoders.text, batch_size=64, progress=progress)

    def _fill_latents(self, cache: TensorCache, encoders: Encoders) -> None:
        assert encoders.images is not None
        encode_images = encoders.images
        flips = (False, True) if self.flip else (False,)
        looks = [(sample, self.bucket(sample)) for sample in (*self.train, *self.held_out)]
        # A class image is shown at the size of the image that it is paired with.
        looks += [(sample, size) for sample in self.class_samples for size in {self.bucket(s) for s in self.train}]
        views = {latent_key(s, size, flip): View(s, size, flip) for s, size in looks for flip in flips}
        for size in sorted({view.size for view in views.values()}):
            keys = [key for key, view in views.items() if view.size == size]
            mine = {key: views[key] for key in share(keys, encoders.rank, encoders.processes)}
            with bar(f"Encoding images at {size[0]}x{size[1]}", sum(key not in cache for key in mine)) as progress:
                cache.fill(
                    mine,
                    lambda batch: encode_images(torch.stack([view.tensor() for view in batch])),
                    batch_size=encoded_at_once(*size, encoders.device.type if encoders.device else "cpu"),
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
        return self._loader(ImageDataset(self._row_settings(), self.train, training=True), sampler)

    def val_dataloader(self) -> DataLoader[Batch] | list[Any]:
        if not self.held_out:
            return []
        trainer = self.trainer
        assert trainer is not None
        micro = max(1, self.batch_size // (trainer.accumulate_grad_batches * trainer.world_size))
        sampler = FixedBatches(list(self.buckets(self.held_out).values()), micro, VALIDATION_TIMESTEPS)
        return self._loader(ImageDataset(self._row_settings(), self.held_out, training=False), sampler)

    def _row_settings(self) -> RowSettings:
        assert self.resolution is not None
        return RowSettings(
            seed=self.seed,
            batch_size=self.batch_size,
            resolution=self.resolution,
            bucket_step=self.bucket_step,
            factor=self.factor,
            texts=self.texts,
            keep=self.keep,
            caption_dropout=self.caption_dropout,
            flip=self.flip,
            random_crop=self.random_crop,
            masked=self.masked,
            control=self.control,
            class_samples=self.class_samples,
            latent_cache=self.latent_cache,
            text_cache=self.text_cache,
        )

    def _loader(self, dataset: Dataset[Any], sampler: Any) -> DataLoader[Batch]:
        return DataLoader(
            dataset,
            batch_sampler=sampler,
            num_workers=self.workers,
            collate_fn=partial(collate, prior_weight=self.prior_weight),
            worker_init_fn=begin_worker,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=self.workers > 0,
        )
