"""``sdtune evaluate``: measure the artifact of a finished run."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from sdtune.commands.checks import build_evaluation_data
from sdtune.commands.describe import metrics_table
from sdtune.commands.threads import choose_threads
from sdtune.config import hardware
from sdtune.config.build import build
from sdtune.config.settings import plain, read_saved_config, read_settings
from sdtune.data import ImageDataModule
from sdtune.errors import UserError
from sdtune.files import read_json, write_json
from sdtune.runs.metrics import OF_TRAINING, finite
from sdtune.sampling.run_models import RunModels

log = logging.getLogger("sdtune")

_CLIP_METRICS = "sdtune.evaluation.ClipMetrics"


def prepare(config: DictConfig, folder: Path) -> Callable[[DictConfig], Any]:
    """Check ``config`` and the run that it names, and return the function that measures the run's artifact."""
    options = plain(config, ("hardware",))
    hardware.check_hardware(options["hardware"])
    run = Path(str(options["run"])).expanduser()
    # The run may come from another user: use the trust setting of this command, not that of the run.
    run_config = {**read_saved_config(run), "trust": options["trust"], "hardware": options["hardware"]}
    models = {key: str(options[key]) for key in ("clip", "dino") if options[key] is not None}
    if models or run_config["backbone"].get("clip"):
        backbone = run_config["backbone"]
        default = {"_target_": _CLIP_METRICS, "sampling": _sampling(backbone), "clip": backbone.get("clip")}
        run_config["evaluation"] = {**(run_config["evaluation"] or default), **models}
    if not run_config["evaluation"]:
        raise UserError(
            f"{run} was trained with evaluation=none", key="run", remedy="set clip=FOLDER or dino=FOLDER to measure it"
        )
    data = build_evaluation_data(run_config)
    device = hardware.first_device(options["hardware"])

    def start(composed: DictConfig) -> None:
        with choose_threads(options["hardware"]):
            execute(run_config, data, run, device, folder)

    return start


def _sampling(backbone: dict[str, Any]) -> dict[str, Any]:
    """Sampling config that ``evaluation=clip`` uses with ``backbone``."""
    return {"_target_": "sdtune.sampling.loop.Sampling", "guidance": backbone["guidance"]}


def execute(config: dict[str, Any], data: ImageDataModule, run: Path, device: torch.device, folder: Path) -> None:
    """Measure the artifact of ``run``; write grids and ``evaluation.json`` to ``folder``.

    ``evaluation.json`` also contains the metrics that only a training can measure, copied from the run.
    """
    settings = read_settings(config)
    evaluation = build(config["evaluation"], settings.trust)
    source = build(config["backbone"], settings.trust)
    tiling = bool(config["hardware"].get("vae_tiling"))
    models = RunModels(source, run / "artifact", settings.name or data.name, device, vae_tiling=tiling)
    metrics = finite(evaluation.run(models, data, folder))
    metrics_file = run / "metrics.json"
    training_metrics = read_json(metrics_file, "run") if metrics_file.is_file() else {}
    copied = {key: value for key, value in training_metrics.items() if key in OF_TRAINING}
    reasons = {key: reason for key, reason in training_metrics.get("reasons", {}).items() if key in copied}
    reasons |= metrics.get("reasons", {})
    metrics = {**copied, **metrics, **({"reasons": reasons} if reasons else {})}
    write_json(folder / "evaluation.json", metrics)
    for line in metrics_table(metrics):
        log.info("%s", line)
    log.info("metrics: %s", folder / "evaluation.json")
