"""LightningDataModule for captioned images: aspect-ratio buckets, caches, deterministic order."""

from __future__ import annotations

import hashlib
import itertools
import logging
import multiprocessing
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Annotated, Any

import pytorch_lightning as pl
import torch
from annotated_types import Ge, Gt, Interval, MinLen
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from sdtune.conditioning import Conditioning
from sdtune.data import prompts, triggers
from sdtune.data.batch_sizes import class_image_batch_size, vae_batch_size
from sdtune.data.buckets import Size
from sdtune.data.cache import EncoderCaches, TensorCache, keys_of_rank, text_key
from sdtune.data.captions import CaptionRules, Captions
from sdtune.data.control.base import Control
from sdtune.data.dataset import Batch, BatchSettings, ImageDataset, RowSettings, collate, init_worker
from sdtune.data.entries import Buckets, Entries, Resolutions, Share, buckets_of, entries_of, join_entries
from sdtune.data.order import FixedBatches, MicroBatches, Order
from sdtune.data.prior import GenerateImages, class_images, generate_missing
from sdtune.data.samples import Sample, SampleList, SampleSequence, latent_key
from sdtune.data.table import StoredImage
from sdtune.data.table_samples import MaskSource
from sdtune.data.templates import TemplateSet, templates
from sdtune.data.views import View, map_key
from sdtune.errors import UserError, check_multiple
from sdtune.hardware.threads import usable_cores
from sdtune.progress import bar

VALIDATION_TIMESTEPS = 8
"""Number of timesteps at which the validation loss of each held-out image is computed."""

MAX_WORKERS = 4
"""Maximum number of processes that load images, if ``data.workers`` is null."""

_PREFETCHED_BATCHES = 2
"""Batches that each of torch's loader processes prepares in advance."""

SHARED_MEMORY = Path("/dev/shm")

_LARGE_CACHE = 100e6
"""Size in bytes from which a cache of text embeddings is announced."""

log = logging.getLogger("sdtune")


@dataclass(frozen=True)
class CacheInputs:
    """Encoders, cache keys and image generator with which a data module fills its caches.

    Args:
        encode_images: encodes images [B, 3, H, W] as moments [B, 2C, h, w]; None if the VAE is trained.
        encode_text: encodes prompts as text embeddings; None if a text encoder is trained.
        encode_waiting: if a text encoder is trained, encodes prompts with those that only then are on the device, as
            hidden states [B, T, D]; None if there are none, or they are trained.
        encoders_on_device: context in which prompts are encoded.
        text_batch_size: number of prompts that are encoded at once.
        encode_conditions: encodes conditions by name, such as ``control``: control maps [B, 3, H, W] in [0, 1]; None:
            they are used as they are.
        text_bytes: size of the text embeddings of one prompt.
        vae_key, text_encoder_key: names of the subfolders of ``folder/latents`` and ``folder/text``; empty if the
            encoder is trained and no other encoder waits.
        folder: the cache folder.
        generate_images: generates class images with the initial weights of the model; None: they exist already.
        generator_key: name of the subfolder of ``folder/class``.
        device: the run's device, for the control-map estimators and the VAE's batch size; None: the CPU.
        rank, processes: this process and the number of processes that fill the caches together.
    """

    encode_images: Callable[[Tensor], Tensor] | None
    vae_key: str
    encode_text: Callable[[Sequence[str]], Conditioning] | None
    text_encoder_key: str
    folder: Path
    text_bytes: int = 0
    encode_waiting: Callable[[Sequence[str]], Tensor] | None = None
    encoders_on_device: Callable[[], AbstractContextManager[None]] = nullcontext
    text_batch_size: int = 64
    encode_conditions: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]] | None = None
    generate_images: GenerateImages | None = None
    generator_key: str = ""
    device: torch.device | None = None
    rank: int = 0
    processes: int = 1


@dataclass(kw_only=True, eq=False)
class ImageDataModule(pl.LightningDataModule, ABC):
    """Base class of the data modules: captioned images, optionally with class images, loss masks and control maps.

    Args:
        batch_size: samples per optimizer step, over all processes and micro-batches.
        resolution: buckets have at most the area of a square with this side, in pixels; None: the backbone's side. Of
            several, each image is used once for each, but is left out where it is too small.
        caption_dropout: fraction of samples that are trained without caption (Ho & Salimans 2022, section 3.2).
        flip: mirror half of the samples.
        random_crop: crop at a random position instead of the center; not possible with cached latents.
        cache_latents: encode each image once if the VAE is frozen. The mean and log-variance of the VAE's posterior
            are stored, and each step draws a latent from them.
        cache_text: encode each caption once if the text encoder is frozen.
        workers: processes that load images; None: 0, but up to four for the training images on Linux if images, masks
            or control maps are read in the steps of a training on a CUDA device, fewer than the cores of this process,
            and as many as the shared memory (``/dev/shm``) allows.
        limit: train on the first ``limit`` images only; None: all.
        validation_limit: validate on the first ``validation_limit`` held-out images only; None: all.
        captions: how captions become prompts: tags, wildcards, several captions of an image.
        templates: prompt templates for the captions, chosen at random for each sample: ``object`` or ``style`` (those
            of Textual Inversion), or a list of texts with ``{}`` for the caption.
        mask: weight the loss by a mask of each image: ``file`` reads ``image.mask.png`` next to ``image.jpg`` (white
            counts), ``alpha`` takes the image's transparency (opaque counts). Null: all pixels count.
        class_prompt: prompt for the class of the subject ("a photo of a dog"), or several that are used in turn.
            ``class_prompt`` or ``class_path`` turns on prior preservation: each sample is then a pair of a subject
            image and a class image.
        class_path: folder of class images; None: the model generates them before training.
        class_images: number of class images to generate.
        prior_weight: lambda of L = L_subject + lambda L_class; 0: no class images.
        control: source of the control maps.
        weight: as a source of ``data=mix``, entries per epoch relative to the largest source; None: its repeats.
        loss_weight: as a source of ``data=mix``, weight of its losses.
        seed: the run's seed; determines order, crops, flips and dropout.
    """

    batch_size: Annotated[int, Ge(1)] = 2
    resolution: Annotated[int, Gt(0)] | Annotated[list[Annotated[int, Gt(0)]], MinLen(1)] | None = None
    caption_dropout: Annotated[float, Interval(ge=0, le=1)] = 0.0
    flip: bool = False
    random_crop: bool = False
    cache_latents: bool = True
    cache_text: bool = True
    workers: Annotated[int, Ge(0)] | None = None
    limit: Annotated[int, Ge(1)] | None = None
    validation_limit: Annotated[int, Ge(1)] | None = None
    captions: Captions = field(default_factory=Captions)
    templates: TemplateSet | Sequence[str] | None = None
    mask: MaskSource | None = None
    class_prompt: str | Annotated[list[str], MinLen(1)] | None = None
    class_path: str | None = None
    class_images: Annotated[int, Ge(1)] = 200
    prior_weight: Annotated[float, Ge(0)] = 1.0
    control: Control | None = None
    weight: Annotated[float, Gt(0)] | None = None
    loss_weight: Annotated[float, Ge(0)] = 1.0
    seed: int = 0

    factor: int = field(default=8, init=False)
    _opened_for: tuple[int, int] | None = field(default=None, init=False)
    _train: SampleSequence = field(default_factory=lambda: SampleList(()), init=False)
    _held_out: SampleSequence = field(default_factory=lambda: SampleList(()), init=False)
    resolutions: Resolutions = field(default_factory=lambda: Resolutions((), ()), init=False)
    caches: EncoderCaches = field(default=EncoderCaches(), init=False)
    prompt_templates: Sequence[str] = field(default=(), init=False)
    _resumed_fingerprint: str = field(default="", init=False)
    class_samples: Sequence[Sample] = field(default=(), init=False)
    notices: list[str] = field(default_factory=list, init=False)
    """Lines for the data summary about files and folders that are not used or look wrong."""
    skipped: list[StoredImage] = field(default_factory=list, init=False)
    """Damaged images that are left out."""
    skips_damaged: bool = field(default=False, init=False)
    """Whether images that cannot be read are left out, and replaced if they become unreadable during the training."""

    def __post_init__(self) -> None:
        super().__init__()
        if self.random_crop and self.cache_latents:
            raise UserError(
                "not possible with cached latents", key="data.random_crop", remedy="set data.cache_latents=false"
            )
        if self.control is not None and self.has_prior:
            raise UserError(
                "class images have no control maps",
                key="data.class_prompt",
                remedy="remove the class images or data.control",
            )
        if self.class_path is not None and not isinstance(self.class_prompt, str | None):
            raise UserError(
                "several prompts are not possible with data.class_path",
                key="data.class_prompt",
                remedy="set one prompt",
            )
        self.prompt_templates = templates(self.templates)

    # --- defined by subclasses

    name: str = field(default="images", init=False)
    """Default base name of a run's output files."""

    trigger: str | None = field(default=None, init=False)
    """Trigger word of the captions, if there is one."""

    @abstractmethod
    def read(self) -> tuple[Sequence[Sample], Sequence[Sample]]:
        """Read the training samples and the held-out samples.

        Raises:
            UserError: the data is not usable.
        """

    def read_class(self, path: str) -> Sequence[Sample]:
        """Read the samples in a folder of class images.

        Raises:
            UserError: the data source does not support ``class_path``, unless a subclass overrides this method.
        """
        raise UserError(
            f"not supported by {type(self).__name__} data, whose class images are generated",
            key="data.class_path",
            remedy="remove data.class_path",
        )

    @property
    def parts(self) -> dict[str, ImageDataModule]:
        """The sources by name: this data module alone, unless it is a mix."""
        return {"": self}

    # --- samples, buckets and prompts

    def open(self, side: int, factor: int) -> None:
        """Read the samples; loads no weights.

        Args:
            side: image size of the backbone in pixels.
            factor: downscaling factor of its VAE.

        Raises:
            UserError: the data cannot be used.
        """
        if self._opened_for == (side, factor):
            return
        self._opened_for, self.factor = (side, factor), factor
        self._set_resolutions(side)
        self.notices, self.skipped = [], []
        train, held_out = (self._as_samples(samples) for samples in self.read())
        self._train, self._held_out = train.first(self.limit), held_out.first(self.validation_limit)
        self._forget()
        self._open_controls()
        if self.has_prior and self.class_path is not None:
            self.class_samples = self.read_class(self.class_path)
        if self.has_prior:
            self._check_class_captions()

    def _open_controls(self) -> None:
        if self.control is not None:
            self.control.open(self._train)
            self.control.open(self._held_out)

    def _as_samples(self, samples: Sequence[Sample]) -> SampleSequence:
        return samples if isinstance(samples, SampleSequence) else SampleList(samples, CaptionRules(self.captions))

    def _set_resolutions(self, side: int) -> None:
        """Set the resolutions; without ``data.resolution``, that of the backbone."""
        configured = self.resolution or side
        sides = sorted({configured} if isinstance(configured, int) else set(configured))
        for resolution in sides:
            check_multiple(resolution, self.factor, "data.resolution")
        self.resolutions = Resolutions((*sides,), tuple(bucket_step(side, self.factor) for side in sides))

    def _forget(self) -> None:
        """Forget what was computed from other samples."""
        for name in ("entries", "held_out_entries", "buckets", "fingerprint"):
            self.__dict__.pop(name, None)

    def _check_class_captions(self) -> None:
        class_captions = dict.fromkeys(self.class_prompts, "")
        class_captions |= {sample.caption: f", the caption of {sample}," for sample in self.class_samples}
        for caption in self.train.captions():
            if caption in class_captions:
                raise UserError(
                    f"{caption!r}{class_captions[caption]} is also a caption of the subject",
                    key="data.class_prompt" if self.class_path is None else "data.class_path",
                    remedy="add a rare word to the subject's captions",
                )

    @property
    def has_prior(self) -> bool:
        """Whether training includes class images (prior preservation)."""
        return self.prior_weight > 0 and (self.class_prompt is not None or self.class_path is not None)

    @property
    def class_prompts(self) -> tuple[str, ...]:
        """Class prompts, used in turn; empty if there is none."""
        return (self.class_prompt,) if isinstance(self.class_prompt, str) else tuple(self.class_prompt or ())

    @property
    def train(self) -> SampleSequence:
        """Training samples, available after :meth:`open`."""
        return self._train

    @property
    def held_out(self) -> SampleSequence:
        """Held-out samples for validation, available after :meth:`open`."""
        return self._held_out

    @property
    def side(self) -> int:
        """The largest resolution in pixels, available after :meth:`open`."""
        return self.resolutions.sides[-1]

    def bucket(self, sample: Sample) -> Size:
        """Training size (width, height) of ``sample`` at the largest resolution that it has an entry for."""
        return self.resolutions.largest_size(sample.size, str(sample))

    @cached_property
    def entries(self) -> Entries:
        """Entries of the training samples."""
        return join_entries([entries_of(s.train, s.resolutions, n) for n, s in enumerate(self.parts.values())])

    @cached_property
    def held_out_entries(self) -> Entries:
        """Entries of the held-out samples."""
        return join_entries([entries_of(s.held_out, s.resolutions, n) for n, s in enumerate(self.parts.values())])

    @cached_property
    def buckets(self) -> Buckets:
        """Buckets of the training entries."""
        shares = [Share(name, s.weight, s.has_prior) for name, s in self.parts.items()]
        return buckets_of(self.entries, shares)

    def order(self) -> Order:
        """Order of the training entries in global batches."""
        return Order(self.buckets.fixed, self.batch_size, self.seed, self.buckets.drawn)

    def training_prompts(self) -> Iterator[str]:
        """The prompts of the training images, without draws and duplicates; read one after the other."""
        return prompts.distinct(prompts.in_turn([source.of_training() for source in self._prompt_sources()]))

    def all_prompts(self) -> Iterator[str]:
        """All prompts of training and validation, without draws and duplicates; read one after the other.

        They include those of class images, and those that replace dropped captions.
        """
        return prompts.distinct(prompts.in_turn([source.every() for source in self._prompt_sources()]))

    def trigger_words(self) -> str | None:
        """``trigger``, or the words that all captions have in common (:func:`sdtune.data.triggers.trigger_words`)."""
        return self.trigger or triggers.trigger_words(self.training_prompts())

    def _prompt_sources(self) -> list[prompts.PromptSource]:
        return [source._prompt_source() for source in self.parts.values()]

    def _prompt_source(self) -> prompts.PromptSource:
        # Captions of class images have no trigger word, so a dropped one is empty.
        dropped = [self._dropped_prompt, *([""] if self.has_prior else [])] if self.caption_dropout else []
        class_captions = [sample.caption for sample in self.class_samples]
        return prompts.PromptSource(self.train, self.held_out, self.prompt_templates, class_captions, dropped)

    @property
    def _dropped_prompt(self) -> str:
        """Prompt that replaces a dropped caption: the trigger word, or an empty text."""
        return self.trigger or ""

    # --- checkpoints

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the training and validation data.

        It covers images, masks, control maps, class images, captions, repeats and order.
        """
        digest = hashlib.sha256()
        for name, source in self.parts.items():
            digest.update(f"{name}|{source.weight}\n".encode() if name else b"")
            for samples in (source.train, source.held_out):
                sizes = entries_of(samples, source.resolutions).sizes if source.mask is not None else None
                samples.update_digest(
                    digest.update, sizes, maps=source.control is not None and source.control.reads_files
                )
            for sample in source.class_samples if source.class_path is not None else ():
                digest.update(f"class|{sample.content()}|{sample.caption}\n".encode())
        return digest.hexdigest()

    def state_dict(self) -> dict[str, Any]:
        return {"fingerprint": self.fingerprint}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._resumed_fingerprint = state_dict["fingerprint"]

    # --- caches

    def generate_class_images(self, inputs: CacheInputs) -> None:
        """Generate this process's share of the missing class images, and set ``class_samples``.

        Does nothing without prior preservation or with ``class_path``.
        """
        if not self.has_prior or self.class_path is not None:
            return
        assert self.class_prompt is not None
        folder = inputs.folder / "class" / inputs.generator_key
        images = class_images(folder, self.class_prompts, self.class_images, self.side)
        if inputs.generate_images is not None:
            generate_missing(
                images,
                inputs.generate_images,
                inputs.rank,
                inputs.processes,
                batch_size=class_image_batch_size(self.side),
            )
        self.class_samples = images

    def prepare(self, inputs: CacheInputs) -> None:
        """Compare the data with that of a resumed run, estimate control maps, and fill the caches.

        Inputs without a cache (see ``cache_latents``, ``cache_text``, ``inputs``) are encoded in each step.

        Raises:
            UserError: the data of a resumed run has changed since the run started.
        """
        if self._resumed_fingerprint and self._resumed_fingerprint != self.fingerprint:
            raise UserError(
                "the data has changed since the run started (images, class images, masks, control maps, captions,"
                " repeats or order)",
                key="resume",
                remedy="restore the data, or start a new run",
            )
        # Another run may have used this data module before, with other parts trained.
        self.caches = EncoderCaches()
        for source in self.parts.values():
            if source.control is not None:
                every = itertools.chain(source.train, source.held_out)
                source.control.prepare(every, inputs.rank, inputs.processes, inputs.device)
        latents = conditions = None
        if self.cache_latents and inputs.encode_images is not None:
            latents = TensorCache(inputs.folder / "latents" / inputs.vae_key)
            self._fill_latents(latents, inputs)
            if inputs.encode_conditions is not None:
                conditions = latents
                self._fill_conditions(conditions, inputs)
        is_encoded = inputs.encode_text is not None or inputs.encode_waiting is not None
        text = self._fill_text(inputs) if self.cache_text and is_encoded else None
        is_whole = inputs.encode_text is not None
        self.caches = EncoderCaches(latents, text if is_whole else None, conditions, None if is_whole else text)

    def _fill_text(self, inputs: CacheInputs) -> TensorCache | None:
        """Encode all prompts; None if they are too many."""
        all_prompts = prompts.all_variants(self._prompt_sources())
        if all_prompts is None:
            return None
        encode_text, encode_waiting = inputs.encode_text, inputs.encode_waiting

        def rows(batch: Sequence[str]) -> list[dict[str, Tensor]]:
            if encode_text is not None:
                return encode_text(batch).rows()
            assert encode_waiting is not None
            return [{"states": states} for states in encode_waiting(batch)]

        cache = TensorCache(inputs.folder / "text" / inputs.text_encoder_key)
        keys = {text_key(prompt): prompt for prompt in all_prompts}
        rank_prompts = {key: keys[key] for key in keys_of_rank(keys, inputs.rank, inputs.processes)}
        missing = sum(key not in cache for key in rank_prompts)
        if missing * inputs.text_bytes >= _LARGE_CACHE:
            size = missing * inputs.text_bytes / 1e9
            log.info("the text embeddings of %d captions take %.1f GB in %s", missing, size, cache.folder)
        on_device = inputs.encoders_on_device() if missing else nullcontext()
        with on_device, bar("Encoding captions", missing) as progress:
            cache.fill(rank_prompts, rows, batch_size=inputs.text_batch_size, progress=progress)
        return cache

    def _fill_latents(self, cache: TensorCache, inputs: CacheInputs) -> None:
        assert inputs.encode_images is not None
        encode_images = inputs.encode_images
        views = {latent_key(view.sample, view.size, view.flip): view for view in self._views()}
        self._fill_views(cache, inputs, "images", views, lambda batch: {"moments": encode_images(batch)})

    def _fill_conditions(self, cache: TensorCache, inputs: CacheInputs) -> None:
        assert inputs.encode_conditions is not None
        encode = inputs.encode_conditions
        views = {
            map_key(view.control, view.sample, view.size, view.flip): view
            for view in self._views(of_maps=True)
            if view.control is not None
        }
        self._fill_views(cache, inputs, "control maps", views, lambda batch: encode({"control": batch}))

    def _views(self, *, of_maps: bool = False) -> Iterator[View]:
        """Images, or control maps, at the sizes and mirrorings in which they are used."""
        for name, sample, size in self._sized_samples():
            source = self.parts[name]
            for flip in (False, True) if source.flip else (False,):
                yield View(sample, size, flip, source.control if of_maps else None)

    def _fill_views(
        self,
        cache: TensorCache,
        inputs: CacheInputs,
        what: str,
        views: Mapping[str, View],
        encode: Callable[[Tensor], Mapping[str, Tensor]],
    ) -> None:
        def entries(batch: Sequence[View]) -> list[dict[str, Tensor]]:
            encoded = encode(torch.stack([view.tensor() for view in batch]))
            return [{name: values[row] for name, values in encoded.items()} for row in range(len(batch))]

        for size in sorted({view.size for view in views.values()}):
            keys = [key for key, view in views.items() if view.size == size]
            rank_views = {key: views[key] for key in keys_of_rank(keys, inputs.rank, inputs.processes)}
            if any(source.skips_damaged for source in self.parts.values()):
                rank_views = {key: view for key, view in rank_views.items() if key in cache or view.is_readable()}
            with bar(f"Encoding {what} at {size[0]}x{size[1]}", sum(k not in cache for k in rank_views)) as progress:
                batch_size = vae_batch_size(*size, inputs.device.type if inputs.device else "cpu")
                cache.fill(rank_views, entries, batch_size=batch_size, progress=progress)

    def _sized_samples(self) -> Iterator[tuple[str, Sample, Size]]:
        """Source, sample and training size of everything that the latent cache holds."""
        names, sources = [*self.parts], [*self.parts.values()]
        for entries, samples in (
            (self.entries, [source.train for source in sources]),
            (self.held_out_entries, [source.held_out for source in sources]),
        ):
            for entry in range(len(entries)):
                number = int(entries.sources[entry])
                yield names[number], samples[number][int(entries.rows[entry])], entries.size(entry)
        for number, source in enumerate(sources):
            # A class image has the size of the subject image that it is paired with.
            sizes = {(w, h) for w, h in self.entries.sizes[self.entries.sources == number].tolist()}
            yield from ((names[number], sample, size) for sample in source.class_samples for size in sizes)

    # --- loaders

    def train_dataloader(self) -> DataLoader[Batch]:
        trainer = self.trainer
        assert trainer is not None
        sampler = MicroBatches(
            self.order(),
            steps=trainer.max_steps,
            accumulation=trainer.accumulate_grad_batches,
            rank=trainer.global_rank,
            processes=trainer.world_size,
            start=lambda: trainer.global_step,
        )
        workers = self._automatic_workers() if self.workers is None else self.workers
        samples = [source.train for source in self.parts.values()]
        return self._loader(self._dataset(samples, self.entries, training=True), sampler, workers)

    def val_dataloader(self) -> DataLoader[Batch] | list[Any]:
        if not self.held_out:
            return []
        trainer = self.trainer
        assert trainer is not None
        micro_batch_size = max(1, self.batch_size // (trainer.accumulate_grad_batches * trainer.world_size))
        buckets = buckets_of(self.held_out_entries, [Share()] * len(self.parts))
        sampler = FixedBatches(
            [buckets.entries(number) for number in range(len(buckets.sizes))],
            micro_batch_size,
            VALIDATION_TIMESTEPS,
            trainer.global_rank,
            trainer.world_size,
        )
        samples = [source.held_out for source in self.parts.values()]
        dataset = self._dataset(samples, self.held_out_entries, training=False)
        return self._loader(dataset, sampler, self.workers or 0)

    def _dataset(self, samples: Sequence[SampleSequence], entries: Entries, *, training: bool) -> ImageDataset:
        sources = [*self.parts.values()]
        prior_weights = {source.prior_weight for source in sources if source.has_prior}
        is_weighted = len(prior_weights) > 1 or any(source.loss_weight != 1 for source in sources)
        common = BatchSettings(
            seed=self.seed,
            batch_size=self.batch_size,
            factor=self.factor,
            has_masks=any(source.mask is not None for source in sources),
            is_weighted=training and is_weighted,
            caches=self.caches,
        )
        rows = [source._row_settings() for source in sources]
        return ImageDataset(common, rows, samples, entries, training=training)

    def _row_settings(self) -> RowSettings:
        """Settings of the rows of this source."""
        return RowSettings(
            rules=self.train.rules,
            prompt_templates=self.prompt_templates,
            caption_dropout_prompt=self._dropped_prompt,
            caption_dropout=self.caption_dropout,
            flip=self.flip,
            random_crop=self.random_crop,
            masked=self.mask is not None,
            conditions={} if self.control is None else {"control": self.control},
            class_samples=self.class_samples if self.has_prior else (),
            skips_damaged=self.skips_damaged,
            loss_weight=self.loss_weight,
            prior_weight=self.prior_weight,
        )

    def _loader(self, dataset: Dataset[Any], sampler: Any, workers: int) -> DataLoader[Batch]:
        assert self.trainer is not None
        return DataLoader(
            dataset,
            batch_sampler=sampler,
            num_workers=workers,
            collate_fn=partial(collate, prior_weight=self._prior_weight),
            worker_init_fn=init_worker,
            pin_memory=self.trainer.strategy.root_device.type == "cuda",
            persistent_workers=workers > 0,
        )

    @property
    def _prior_weight(self) -> float:
        """Loss weight of the class images, if it is the same for all sources."""
        return next((source.prior_weight for source in self.parts.values() if source.has_prior), self.prior_weight)

    def _automatic_workers(self) -> int:
        """Number of loader processes: none if all inputs are cached, and none on a CPU, whose cores the training needs.

        Only on Linux: elsewhere, a process starts by importing everything again. Batches go through shared memory, of
        which containers often have 64 MiB.
        """
        trainer, resolution = self.trainer, self.side
        assert trainer is not None
        sources = [*self.parts.values()]
        has_control = any(source.control is not None for source in sources)
        reads_maps = has_control and self.caches.conditions is None
        is_decoding = self.caches.latents is None or reads_maps or any(source.mask is not None for source in sources)
        if trainer.strategy.root_device.type != "cuda" or not is_decoding:
            return 0
        if not SHARED_MEMORY.is_dir() or multiprocessing.get_start_method() != "fork":
            return 0
        local_processes = max(1, trainer.num_devices)
        images = self.batch_size // (trainer.accumulate_grad_batches * trainer.world_size)
        images *= (2 if self.has_prior else 1) * (2 if has_control else 1)
        prefetched = _PREFETCHED_BATCHES * max(1, images) * 3 * 4 * resolution**2
        free = shutil.disk_usage(SHARED_MEMORY).free // local_processes
        return max(0, min(MAX_WORKERS, usable_cores() // local_processes - 1, free // prefetched - 1))


def bucket_step(resolution: int, factor: int) -> int:
    """Step between the sides of the buckets of ``resolution`` in pixels: 64, or less for small resolutions."""
    return min(64, max(factor * 8, factor * (resolution // factor // 8)))
