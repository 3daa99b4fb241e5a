"""``sdtune evaluate``: measure the artifact of a finished run."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from sdtune.commands.checks import check_measured
from sdtune.commands.threads import chosen_threads
from sdtune.config import hardware
from sdtune.config.build import build
from sdtune.config.settings import kept_config, plain, read_settings
from sdtune.data import ImageDataModule
from sdtune.errors import UserError
from sdtune.files import write_json
from sdtune.hardware.devices import device as device_of
from sdtune.runs.metrics import OF_TRAINING, finite, unit

log = logging.getLogger("sdtune")

_WITH_CLIP = "sdtune.evaluation.ClipMetrics"


def prepare(config: DictConfig, folder: Path) -> Callable[[DictConfig], Any]:
    """The run's own config decides what is measured."""
    own = plain(config)
    hardware.check_hardware(own["hardware"])
    run = Path(str(own["run"])).expanduser()
    # The run's config may come from somebody else: only what the user trusts here counts.
    trained = {**kept_config(run), "trust": own["trust"], "hardware": own["hardware"]}
    for key in ("clip", "dino"):
        if own[key] is not None:
            asked = trained["evaluation"] or {"_target_": _WITH_CLIP, "sampling": _sampling(trained["backbone"])}
            trained["evaluation"] = {**asked, key: str(own[key])}
    if not trained["evaluation"]:
        raise UserError(
            f"{run} was trained with evaluation=none", key="run", remedy="give clip=FOLDER or dino=FOLDER to measure it"
        )
    data = check_measured(trained)
    accelerator = str(own["hardware"]["accelerator"])

    def start(composed: DictConfig) -> None:
        with chosen_threads(own["hardware"]):
            execute(trained, data, run, accelerator, folder)

    return start


def _sampling(backbone: dict[str, Any]) -> dict[str, Any]:
    """As ``evaluation=clip`` samples with ``backbone``."""
    return {"_target_": "sdtune.sampling.loop.Sampling", "guidance": backbone["guidance"]}


def execute(config: dict[str, Any], data: ImageDataModule, run: Path, accelerator: str, folder: Path) -> None:
    """Measure, and write ``evaluation.json`` beside the grids in ``folder``, with what only a training measures."""
    top = read_settings(config)
    device = device_of(accelerator)
    evaluation = build(config["evaluation"], top.trust)
    source = build(config["backbone"], top.trust)
    metrics = finite(evaluation.run(source, data, run / "artifact", top.name or data.name, device, folder))
    complete = run / "metrics.json"
    before = json.loads(complete.read_text()) if complete.is_file() else {}
    kept = {key: value for key, value in before.items() if key in OF_TRAINING}
    reasons = {key: why for key, why in before.get("reasons", {}).items() if key in kept}
    reasons |= metrics.get("reasons", {})
    metrics = {**kept, **metrics, **({"reasons": reasons} if reasons else {})}
    write_json(folder / "evaluation.json", metrics)
    for line in _table(metrics):
        log.info("%s", line)
    log.info("metrics: %s", folder / "evaluation.json")


def _table(metrics: dict[str, Any]) -> list[str]:
    """What was measured, as the model was and as it is; what could not be, with the reason; what training cost."""
    measured = [
        key
        for key, value in metrics.items()
        if key not in OF_TRAINING and not key.startswith("base_") and isinstance(value, int | float)
    ]
    rows = [("", "before", "after")]
    rows += [(key, _number(metrics.get(f"base_{key}"), key), _number(metrics[key], key)) for key in measured]
    lines = [f"{name:<28}{before:>12}{after:>12}".rstrip() for name, before, after in rows]
    lines += [f"{key}: not measured: {why}" for key, why in metrics.get("reasons", {}).items()]
    cost = [f"{key} {_number(metrics[key], key)}" for key in OF_TRAINING if metrics.get(key) is not None]
    return [*lines, *([f"of its training: {', '.join(cost)}"] if cost else [])]


def _number(value: Any, key: str) -> str:
    return "" if value is None else unit(value, key)
