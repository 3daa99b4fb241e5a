"""``sdtune prepare``: class images, caches and control maps, made before training."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig

from sdtune.callbacks.data_summary import DataSummary
from sdtune.commands.checks import check_run
from sdtune.commands.threads import chosen_threads
from sdtune.commands.train_run import TrainRun
from sdtune.config.settings import plain
from sdtune.data import ImageDataModule
from sdtune.data.samples import Sample
from sdtune.hardware.child_processes import wait_for_children
from sdtune.images.files import CENTRE
from sdtune.images.grids import grid, save_png
from sdtune.progress import bar

log = logging.getLogger("sdtune")

_SHOWN = 64
_ROW = 8


def prepare(config: DictConfig, folder: Path) -> Callable[[DictConfig], Any]:
    """The same checks as before a training."""
    run = check_run(plain(config), folder)

    def start(composed: DictConfig) -> None:
        with chosen_threads(run.config["hardware"]):
            execute(run)

    return start


def execute(run: TrainRun) -> None:
    """Fill what the training would fill, and write images of what it will see."""
    summary = DataSummary(int(run.trainer["max_steps"]))
    # A training of no steps: all that comes before the first one happens, on every process.
    trainer = run.build_trainer(max_steps=0, callbacks=[summary], logger=False)
    trainer.fit(run.adapter, datamodule=run.data)
    if trainer.is_global_zero:
        _show(run.data, run.folder)
    wait_for_children(trainer)


def _show(data: ImageDataModule, folder: Path) -> None:
    samples = list(data.train[:_SHOWN])
    _sheet(len(data.train), [s.pixels(data.bucket(s), CENTRE, False) for s in samples], folder / "images.png")
    if data.class_samples:
        shown = list(data.class_samples[:_SHOWN])
        _sheet(len(data.class_samples), [s.pixels(s.size, CENTRE, False) for s in shown], folder / "class.png")
        prompts: dict[str, list[str]] = {}
        for sample in data.class_samples:
            prompts.setdefault(sample.caption, []).append(str(sample))
        for prompt, files in prompts.items():
            log.info("class: %d images of %r in %s", len(files), prompt, Path(files[0]).parent)
    if data.control is not None:
        maps, names = [], _names(data.train)
        with bar("Writing control maps", len(data.train)) as progress:
            for number, sample in enumerate(data.train):
                drawn = data.control.map(sample, data.bucket(sample))
                about = {"caption": sample.caption, "image": str(sample)}
                save_png(drawn, folder / "maps" / f"{names[number]}.png", about)
                maps += [drawn] if number < _SHOWN else []
                progress(1)
        _sheet(len(data.train), maps, folder / "maps.png")
        log.info("all %d control maps: %s", len(data.train), folder / "maps")
    log.info("to look at: %s", folder)


def _names(samples: Sequence[Sample]) -> list[str]:
    """The images' own names, by which data/control=paired takes maps; numbers where they have none of their own."""
    stems = [Path(str(sample)).stem for sample in samples if Path(str(sample)).is_file()]
    return stems if len(set(stems)) == len(samples) else [f"{number:05d}" for number in range(len(samples))]


def _sheet(count: int, images: list[np.ndarray], path: Path) -> None:
    """One grid of the first of ``count`` images, each cropped to the smallest sides among them."""
    height, width = (min(p.shape[axis] for p in images) for axis in (0, 1))
    same = [p[:height, :width] for p in images]
    save_png(grid([same[i : i + _ROW] for i in range(0, len(same), _ROW)]), path)
    log.info("%d of %d: %s", len(images), count, path)
