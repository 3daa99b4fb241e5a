"""``sdtune prepare``: create class images, caches and control maps before training."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig

from sdtune.callbacks.data_summary import DataSummary, text_encoder_cost
from sdtune.commands.checks import check_run
from sdtune.commands.data_page import write_page
from sdtune.commands.threads import choose_threads
from sdtune.commands.train_run import TrainRun
from sdtune.config.settings import TRAINING, plain
from sdtune.data import ImageDataModule
from sdtune.data.previews import first_images
from sdtune.data.samples import Sample
from sdtune.data.skipped import write_skipped
from sdtune.hardware.child_processes import wait_for_children
from sdtune.images.files import CENTER
from sdtune.images.grids import grid, save_png
from sdtune.progress import bar
from sdtune.runs.hydra_values import current_overrides

log = logging.getLogger("sdtune")

_MAX_SHOWN = 64
_COLUMNS = 8


def prepare(config: DictConfig, folder: Path) -> Callable[[DictConfig], Any]:
    """Check ``config`` as for a training, and return the function that prepares it."""
    run = check_run(plain(config, TRAINING), folder, typed=current_overrides())

    def start(composed: DictConfig) -> None:
        with choose_threads(run.config["hardware"]):
            execute(run)

    return start


def execute(run: TrainRun) -> None:
    """Fill the caches of the training, and write grids of its inputs."""
    summary = DataSummary(int(run.trainer["max_steps"]))
    # max_steps=0 runs all setup hooks, which fill the caches, on each process.
    trainer = run.build_trainer(max_steps=0, callbacks=[summary], logger=False)
    trainer.fit(run.adapter, datamodule=run.data)
    if trainer.is_global_zero:
        _write_grids(run.data, run.folder)
        write_skipped(run.folder, run.data.skipped)
        for line in text_encoder_cost(run.adapter, run.data, run.micro_batch):
            log.info(line)
        page = write_page(run.data, run.adapter.backbone, run.source.tokenizer_folder(), run.folder)
        log.info("images, captions and counts: %s", page)
    wait_for_children(trainer)


def _write_grids(data: ImageDataModule, folder: Path) -> None:
    images = [s.pixels(part.bucket(s), CENTER, False) for part, s in first_images(data, _MAX_SHOWN)]
    _write_grid(len(data.train), images, folder / "images.png")
    class_samples = [sample for part in data.parts.values() for sample in part.class_samples]
    if class_samples:
        shown = class_samples[:_MAX_SHOWN]
        _write_grid(len(class_samples), [s.pixels(s.size, CENTER, False) for s in shown], folder / "class.png")
        prompts: dict[str, list[str]] = {}
        for sample in class_samples:
            prompts.setdefault(sample.caption, []).append(str(sample))
        for prompt, files in prompts.items():
            log.info("class images: %d of %r in %s", len(files), prompt, Path(files[0]).parent)
    if data.control is not None:
        maps, names = [], _map_names(data.train)
        with bar("Writing control maps", len(data.train)) as progress:
            for number, sample in enumerate(data.train):
                control_map = data.control.map(sample, data.bucket(sample))
                metadata = {"caption": sample.caption, "image": str(sample)}
                save_png(control_map, folder / "maps" / f"{names[number]}.png", metadata)
                maps += [control_map] if number < _MAX_SHOWN else []
                progress(1)
        _write_grid(len(data.train), maps, folder / "maps.png")
        log.info("all %d control maps: %s", len(data.train), folder / "maps")
    log.info("prepared inputs: %s", folder)


def _map_names(samples: Sequence[Sample]) -> list[str]:
    """File stems of the images, by which data/control=paired finds maps; numbers if stems are missing or not unique."""
    stems = [Path(str(sample)).stem for sample in samples if Path(str(sample)).is_file()]
    return stems if len(set(stems)) == len(samples) else [f"{number:05d}" for number in range(len(samples))]


def _write_grid(count: int, images: list[np.ndarray], path: Path) -> None:
    """Write a grid of ``images``, the first of ``count``, cropped to their smallest height and width."""
    height, width = (min(p.shape[axis] for p in images) for axis in (0, 1))
    cropped = [p[:height, :width] for p in images]
    save_png(grid([cropped[i : i + _COLUMNS] for i in range(0, len(cropped), _COLUMNS)]), path)
    log.info("showing %d of %d: %s", len(images), count, path)
