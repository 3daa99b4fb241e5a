"""Sample images of a report, by prompt and seed, setting, run and step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdtune.reporting.collect import Run, SampleImage
from sdtune.reporting.images import SHEET, ImageStore, Source
from sdtune.reporting.ranking import Setting

MOST_IMAGES = 1200
"""Number of sample images of one page; reading them takes about ten seconds."""

_MOST_TRAINING_IMAGES = 12


@dataclass(frozen=True)
class SampleTable:
    """Samples of all settings, best setting first.

    Attributes:
        blocks: for each prompt and seed: ``prompt``, ``seed``, ``base`` (key of the base model's image or None), and
            ``cells``: for each setting a list of its runs, ``{"run": index, "steps": [[step, key], ...]}``.
        omitted: number of sample images that are not in the page.
    """

    blocks: list[dict[str, Any]]
    omitted: int

    def keys(self) -> set[str]:
        """Keys of all images."""
        keys = {block["base"] for block in self.blocks if block["base"]}
        return keys | {
            key for block in self.blocks for cell in block["cells"] for entry in cell for _, key in entry["steps"]
        }


def samples(
    order: Sequence[Setting], numbers: dict[Path, int], store: ImageStore, *, with_base: bool = True
) -> SampleTable:
    """Read at most :data:`MOST_IMAGES` samples of the settings ``order``, those first that a reader looks at first.

    Args:
        order: settings, best first.
        numbers: number of each run in the page, by its folder.
        store: gets the images.
        with_base: whether all settings have the same base model, whose images stand beside theirs.
    """
    files = _by_importance(order)
    chosen = set(files[:MOST_IMAGES])
    store.add([Source(file) for file in files[:MOST_IMAGES]])
    blocks: dict[tuple[str, str], dict[str, Any]] = {}
    for place, setting in enumerate(order):
        for run in setting.runs:
            entries: dict[tuple[str, str], list[tuple[int, str]]] = {}
            for image in run.images:
                key = store.key(Source(image.file)) if image.file in chosen else None
                if key is None:
                    continue
                block = blocks.setdefault((image.prompt, image.seed), _empty_block(image, len(order)))
                if image.step == 0 and with_base:
                    block["base"] = block["base"] or key
                entries.setdefault((image.prompt, image.seed), []).append((image.step, key))
            for name, steps in entries.items():
                blocks[name]["cells"][place].append({"run": numbers[run.folder], "steps": steps})
    return SampleTable(list(blocks.values()), max(len(files) - MOST_IMAGES, 0))


def _empty_block(image: SampleImage, settings: int) -> dict[str, Any]:
    return {"prompt": image.prompt, "seed": image.seed, "base": None, "cells": [[] for _ in range(settings)]}


def _by_importance(order: Sequence[Setting]) -> list[Path]:
    """Files of the samples: the base model's, the last ones of each setting, those of other seeds, earlier steps."""
    groups: tuple[list[Path], ...] = ([], [], [], [])
    of_base: set[tuple[str, str]] = set()
    for setting in order:
        for number, run in enumerate(setting.runs):
            last = {image.file for image in run.last_images()}
            for image in run.images:
                name = (image.prompt, image.seed)
                if image.step == 0 and name not in of_base:
                    of_base.add(name)
                    groups[0].append(image.file)
                elif image.file in last:
                    groups[1 if number == 0 else 2].append(image.file)
                else:
                    groups[3].append(image.file)
    return [file for group in groups for file in group]


def training_copies(run: Run, store: ImageStore, most: int = _MOST_TRAINING_IMAGES) -> list[tuple[str, str]]:
    """Key and caption of the first training images of ``run``."""
    shown = run.training.shown[:most]
    store.add([Source(file) for file, _ in shown])
    keys = [(store.key(Source(file)), caption) for file, caption in shown]
    return [(key, caption) for key, caption in keys if key is not None]


def sheets(run: Run, store: ImageStore) -> list[tuple[str, str]]:
    """Name and key of the image grids of the evaluation of ``run``."""
    store.add([Source(file, SHEET) for file in run.sheets.values()])
    keys = [(name, store.key(Source(file, SHEET))) for name, file in run.sheets.items()]
    return [(name.replace("_", " "), key) for name, key in keys if key is not None]
