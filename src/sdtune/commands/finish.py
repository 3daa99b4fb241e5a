"""After training: metrics, model card, exports."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from sdtune.callbacks.cost import CostMeter
from sdtune.callbacks.metrics_recorder import MetricsRecorder
from sdtune.commands.checks import exports
from sdtune.config.build import build
from sdtune.config.settings import read_settings
from sdtune.data import ImageDataModule
from sdtune.exporting import find_artifact, write_card
from sdtune.methods.base import Adapter
from sdtune.runs.layout import CARD
from sdtune.runs.metrics import finite

log = logging.getLogger("sdtune")


def _validation(record: MetricsRecorder) -> dict[str, Any]:
    """The last validation's loss, and its step: the artifact's own, where the interval divides the run."""
    step = max(record.validation, default=None)
    return {"validation_loss": None if step is None else record.validation[step], "validation_step": step}


def measure_run(
    trainer: pl.Trainer,
    adapter: Adapter,
    data: ImageDataModule,
    record: MetricsRecorder,
    folder: Path,
    name: str,
    config: dict[str, Any],
) -> dict[str, Any]:
    """The content of ``metrics.json``; empty on every process but the first."""
    if not trainer.is_global_zero:
        return {}
    cost = next(c for c in trainer.callbacks if isinstance(c, CostMeter))  # type: ignore[attr-defined]
    metrics: dict[str, Any] = {
        "steps": trainer.global_step,
        **_validation(record),
        **cost.metrics(adapter, data, record, folder / "artifact"),
    }
    if config["evaluation"]:
        trust = read_settings(config).trust
        device = trainer.strategy.root_device  # after fit, Lightning has moved the module to the CPU
        evaluation = build(config["evaluation"], trust)
        log.info("drawing and measuring what was trained; evaluation=none leaves this out")
        metrics |= evaluation.run(adapter.source, data, folder / "artifact", name, device, folder / "evaluation")
    if not record.validation:
        why = (
            f"no validation before step {trainer.global_step}: trainer.val_check_interval is larger"
            if data.held_out
            else "no image is held out: data.hold_out or data.validation_path of data=folder,"
            " data.validation_images of pocket's"
        )
        reasons = {"validation_loss": why, "validation_step": why, "seconds_to_best": why}
        metrics["reasons"] = {**metrics.get("reasons", {}), **reasons}
    metrics = finite(metrics)
    for logger in trainer.loggers:
        logger.log_metrics({f"final/{k}": v for k, v in metrics.items() if isinstance(v, int | float)})
    return metrics


def describe_artifact(
    adapter: Adapter, data: ImageDataModule, folder: Path, config: dict[str, Any], metrics: dict[str, Any]
) -> None:
    """The artifact's model card."""
    source, artifact = adapter.source, find_artifact(folder / "artifact", "run")
    local = source.path if not Path(source.path).expanduser().exists() else Path(source.path).name
    facts: dict[str, Any] = {
        "family": source.facts.family,
        "backbone": local,
        "hash": source.hash(),
        "trigger": data.keep,
    }
    facts |= {"images": len(data.train), "captions": data.captions(), "side": data.resolution}
    write_card(folder / "artifact", artifact, config, facts, metrics, folder / "samples" / "before_after.png")


def export_artifact(adapter: Adapter, folder: Path, config: dict[str, Any]) -> None:
    """The artifact in the further forms that are asked for. One that fails does not undo a run that is complete."""
    for export in exports(config, adapter.artifact_kind):
        try:
            artifact = find_artifact(folder / "artifact", "run")
            place = folder / "export" / export.format
            for written in export.write(artifact, adapter.source, place):
                log.info("export: %s", written)
            export.write_card(artifact, folder / "artifact" / CARD, place)
        except (ValueError, OSError, RuntimeError) as error:
            log.error(
                "exports: %s: %s; the run is complete, and sdtune export run=%s format=%s makes it",
                export.format,
                error,
                folder,
                export.format,
            )
