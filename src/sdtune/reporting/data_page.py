"""``data.html`` of ``sdtune prepare``: the images of a training as they will be cropped, with their captions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from sdtune.files import write_text


@dataclass(frozen=True)
class ImageCard:
    """An image on the page.

    Args:
        thumbnail: file of its thumbnail, relative to the page.
        name: name of its file, or its number.
        place: where it is.
        size: (width, height) in pixels.
        bucket: training size (width, height), in pixels.
        caption: the prompt without draws.
        examples: some prompts that are drawn; empty if nothing is drawn.
        tokens: tokens of the prompt, with start and end token.
        cut: end of the prompt that the text encoder does not read; empty if it reads all.
        repeats: uses per epoch.
        source: name of its source in a mix; empty for other data.
        is_small: whether it has fewer pixels than the resolution.
        group: number of its group of near-duplicates; 0 if it has none.
    """

    thumbnail: str
    name: str
    place: str
    size: tuple[int, int]
    bucket: tuple[int, int]
    caption: str
    examples: Sequence[str]
    tokens: int
    cut: str
    repeats: int
    source: str
    is_small: bool
    group: int

    @property
    def has_problem(self) -> bool:
        """Whether something about the image needs a look."""
        return bool(self.cut or self.is_small or self.group or not self.caption)


@dataclass(frozen=True)
class DataPage:
    """Content of the page.

    Args:
        title: name of the data.
        facts: names and texts of the counts over all images.
        notices: lines about files that are not used or look wrong.
        buckets: training sizes with their number of images, over all images.
        tags: texts between commas with the number of training images that have them.
        damaged: images that are left out, and why.
        cards: the images that are shown.
        total: number of images.
        limit: number of tokens that the text encoder reads.
        duplicates: note on the near-duplicates.
    """

    title: str
    facts: Sequence[tuple[str, str]]
    notices: Sequence[str]
    buckets: Sequence[tuple[str, int]]
    tags: Sequence[tuple[str, int]]
    damaged: Sequence[tuple[str, str]]
    cards: Sequence[ImageCard]
    total: int
    limit: int
    duplicates: str


def write_data_page(folder: Path, page: DataPage) -> Path:
    """Write ``folder/data.html``, atomically, and return its path."""
    loader = PackageLoader("sdtune.reporting", "assets")
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    environment.globals["styles"] = Markup(loader.get_source(environment, "report.css")[0])
    file = folder / "data.html"
    write_text(file, environment.get_template("data.html.j2").render(page=page))
    return file
