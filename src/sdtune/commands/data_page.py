"""Collect what ``data.html`` shows: thumbnails, captions as prompts, tokens, near-duplicates, counts."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from sdtune import streams
from sdtune.backbone.backbone import Backbone
from sdtune.callbacks.data_summary import size_warnings
from sdtune.data import ImageDataModule
from sdtune.data.table_samples import TableSample
from sdtune.files import replacing
from sdtune.images.files import CENTER
from sdtune.progress import bar
from sdtune.randomness import generator
from sdtune.reporting.data_page import DataPage, ImageCard, write_data_page
from sdtune.sampling.prompts import count_tokens, truncated_end
from sdtune.training.caption_facts import caption_facts

MOST_IMAGES = 2000
"""Maximum number of images with a thumbnail, which are compared with each other."""

_THUMBNAILS = "thumbnails"
_SIDE = 320
"""Longer side of a thumbnail, in pixels."""

_DRAWS, _EXAMPLES = 12, 3
"""Captions that are drawn for each image, and the number of different ones that are shown."""

_NEAR = 4
"""Largest number of different bits, of 64, between the perceptual hashes of near-duplicates."""


def write_page(data: ImageDataModule, backbone: Backbone, tokenizer: Path, folder: Path) -> Path:
    """Write ``folder/data.html`` with thumbnails beside it, and return its path.

    Args:
        tokenizer: folder of the tokenizer.
    """
    captions = caption_facts(data, backbone, tokenizer, complete=True)
    cards, images = _cards(data, backbone, folder)
    groups, note = near_duplicates(images)
    cards = [replace(card, group=group) for card, group in zip(cards, groups, strict=True)]
    warnings = [*data.notices, *size_warnings(data, backbone.facts.side)]
    page = DataPage(
        title=data.name,
        facts=[
            ("training images", f"{len(data.train):,}"),
            ("held-out images", f"{len(data.held_out):,}"),
            ("uses per epoch", f"{round(sum(data.buckets.uses(n) for n in range(len(data.buckets.sizes)))):,}"),
            ("steps per epoch", f"{data.order().steps_per_epoch:,} at batch size {data.batch_size}"),
            ("different prompts, without what is drawn", f"{captions.distinct:,}"),
            ("longest prompt", f"{captions.longest_tokens} tokens, the limit is {captions.limit}"),
            ("prompts that are cut", f"{captions.cut:,}"),
            ("too small", f"{_small_count(data):,} images have fewer pixels than the resolution"),
        ],
        notices=warnings,
        buckets=[(f"{w}x{h}", count) for (w, h), count in data.buckets.images_by_size().items()],
        tags=list(captions.tags.items()),
        damaged=[(str(image.place), image.problem or "") for image in data.skipped],
        cards=cards,
        total=len(data.train),
        limit=captions.limit,
        duplicates=note,
    )
    return write_data_page(folder, page)


def _small_count(data: ImageDataModule) -> int:
    return sum(
        int((source.train.sizes.prod(axis=1) < 0.8 * source.resolutions.sides[0] ** 2).sum())
        for source in data.parts.values()
    )


def _cards(data: ImageDataModule, backbone: Backbone, folder: Path) -> tuple[list[ImageCard], list[Image.Image]]:
    """Cards of evenly spaced images of each source, and their thumbnails, which are written to ``folder``."""
    total = len(data.train)
    cards: list[ImageCard] = []
    images: list[Image.Image] = []
    with bar("Writing thumbnails", min(total, MOST_IMAGES)) as progress:
        for name, source in data.parts.items():
            count = max(1, MOST_IMAGES * len(source.train) // max(total, MOST_IMAGES))
            for index in np.unique(np.linspace(0, len(source.train) - 1, count).astype(int)).tolist():
                thumbnail = f"{_THUMBNAILS}/{len(cards):05d}.webp"
                images.append(_thumbnail(source, index, folder / thumbnail))
                rng = generator(data.seed, streams.CAPTION, 0, len(cards))
                cards.append(_card(source, index, name, thumbnail, backbone, rng))
                progress(1)
    return cards, images


def _thumbnail(source: ImageDataModule, index: int, file: Path) -> Image.Image:
    """Thumbnail of an image as it will be cropped, which is written to ``file``."""
    sample = source.train[index]
    image = Image.fromarray(sample.pixels(source.bucket(sample), CENTER, False))
    image.thumbnail((_SIDE, _SIDE), Image.Resampling.LANCZOS)
    with replacing(file, sync=False) as partial:
        image.save(partial, format="WEBP", quality=85)
    return image


def _card(
    source: ImageDataModule, index: int, name: str, thumbnail: str, backbone: Backbone, rng: np.random.Generator
) -> ImageCard:
    sample, texts, rules = source.train[index], source.train.texts(index), source.train.rules
    template = source.prompt_templates[0]
    caption = template.replace("{}", rules.fixed(texts))
    drawn = dict.fromkeys(template.replace("{}", rules.draw(texts, lambda: rng)) for _ in range(_DRAWS))
    tokens = count_tokens(backbone, [caption])[0]
    return ImageCard(
        thumbnail=thumbnail,
        name=sample.place.file.name if isinstance(sample, TableSample) else f"image {index}",
        place=str(sample),
        size=sample.size,
        bucket=source.bucket(sample),
        caption=caption,
        examples=[] if list(drawn) == [caption] else list(drawn)[:_EXAMPLES],
        tokens=tokens,
        cut=truncated_end(backbone, caption) if tokens > backbone.prompt_limit.tokens else "",
        repeats=sample.repeats,
        source=name,
        is_small=sample.size[0] * sample.size[1] < 0.8 * source.resolutions.sides[0] ** 2,
        group=0,
    )


def near_duplicates(images: Sequence[Image.Image]) -> tuple[list[int], str]:
    """Number of the group of near-duplicates of each image, 0 for none, and a note for the page.

    Images whose perceptual hashes (:func:`imagehash.phash`) differ in at most four of 64 bits belong together.
    """
    if importlib.util.find_spec("imagehash") is None:
        return [0] * len(images), "not looked for: install ImageHash (extra: duplicates)"
    import imagehash

    hashes = np.array([np.packbits(imagehash.phash(image).hash.flatten()) for image in images], np.uint8)
    owner = list(range(len(images)))

    def root(index: int) -> int:
        while owner[index] != index:
            index = owner[index]
        return index

    for index in range(1, len(images)):
        distances = np.bitwise_count(hashes[:index] ^ hashes[index]).sum(axis=1)
        for other in np.flatnonzero(distances <= _NEAR).tolist():
            owner[root(index)] = root(other)
    roots = [root(index) for index in range(len(images))]
    several = [first for first in dict.fromkeys(roots) if roots.count(first) > 1]
    numbers = {first: number for number, first in enumerate(several, start=1)}
    groups = [numbers.get(first, 0) for first in roots]
    note = f"{sum(map(bool, groups)):,} images in {len(several):,} groups, among the {len(images):,} that are shown"
    return groups, note
