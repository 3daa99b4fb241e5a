"""``sdtune export``: write an artifact in the formats of other programs."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_type_hints

from omegaconf import DictConfig, OmegaConf

from sdtune.backbone import Pretrained
from sdtune.config.build import build
from sdtune.config.schema import check_node, check_value
from sdtune.config.settings import plain, read_saved_config
from sdtune.config.types import type_text
from sdtune.errors import UserError
from sdtune.exporting import Artifact, Export, find_artifact
from sdtune.paths import is_hub_id
from sdtune.progress import phase
from sdtune.runs.hydra_values import current_overrides
from sdtune.runs.layout import CARD

log = logging.getLogger("sdtune")


def prepare(config: DictConfig, folder: Path) -> Callable[[DictConfig], Any]:
    """Check ``config`` without loading weights, and return the function that exports."""
    hints = get_type_hints(Export, include_extras=True)
    if OmegaConf.is_missing(config, "format"):
        raise UserError("missing value", key="format", remedy=f"set format={type_text(hints['format'])}")
    options = plain(config, ("backbone",))
    export = Export(**{key: _checked_value(options[key], hint, key) for key, hint in hints.items()})
    if (options["run"] is None) == (options["artifact"] is None):
        raise UserError(
            "exactly one of run and artifact is required",
            key="run",
            remedy="set run=FOLDER, or artifact=FILE and its backbone",
        )
    if options["push_to"] is not None:
        _check_push(str(options["push_to"]))
    trust = options["trust"]
    if options["run"] is not None:
        run = Path(str(options["run"])).expanduser()
        path, backbone = run / "artifact", read_saved_config(run)["backbone"]
        if any(text.startswith("backbone.path=") for text in current_overrides()):
            backbone["path"] = options["backbone"]["path"]  # the model has moved
        card = path / CARD
    else:
        path, backbone, card = Path(str(options["artifact"])).expanduser(), options["backbone"], None
    check_node(backbone, "backbone", trust)
    source = build(backbone, trust)
    artifact = find_artifact(path, "run" if options["run"] is not None else "artifact")
    export.check(artifact)
    if any(entry.suffix != ".log" and not entry.name.startswith(".") for entry in folder.glob("*")):
        raise UserError(
            f"{folder} already contains an export",
            key="hydra.run.dir",
            remedy="use another folder or remove this override",
        )
    source.check()
    if artifact.kind == "model":
        source.of_trained_pipeline(artifact.path).check()
    return lambda composed: execute(export, artifact, source, folder, card, options["push_to"])


def _checked_value(value: Any, hint: Any, key: str) -> Any:
    check_value(value, hint, key)
    return value


def _check_push(repository: str) -> None:
    if not is_hub_id(repository):
        raise UserError(
            f"{repository} is not a repository of the Hugging Face Hub", key="push_to", remedy="use USER/NAME"
        )
    if not os.environ.get("HF_TOKEN"):
        raise UserError(
            "HF_TOKEN is not set", key="push_to", remedy="set it in the environment to a token with write access"
        )


def execute(
    export: Export, artifact: Artifact, source: Pretrained, folder: Path, card: Path | None, push_to: str | None
) -> None:
    """Write ``artifact`` to ``folder`` in the format of ``export``, and upload it to ``push_to`` if that is set."""
    with phase("Exporting"):
        written = export.write(artifact, source, folder)
    if card is not None and card.is_file():
        export.write_card(artifact, card, folder)
    for path in written:
        log.info("%s (%.1f MB)", path, _bytes(path) / 1e6)
    if push_to is not None:
        _push(folder, push_to)


def _bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in (path.rglob("*") if path.is_dir() else [path]) if file.is_file())


def _push(folder: Path, repository: str) -> None:
    """Upload ``folder`` without Hydra's files and the log, since these contain paths of this machine."""
    from huggingface_hub import HfApi

    api = HfApi(token=os.environ["HF_TOKEN"])
    try:
        api.create_repo(repository, exist_ok=True, private=True)
        commit = api.upload_folder(
            repo_id=repository, folder_path=folder, ignore_patterns=[".hydra/*", "*.log", ".lock"]
        )
    # huggingface_hub raises errors of its HTTP library, which is requests or httpx, depending on the release.
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"{repository}: {reason}", key="push_to", remedy=f"upload the exported files in {folder} yourself"
        ) from error
    log.info("pushed (new repositories are private): %s", json.dumps(str(commit)).strip('"'))
