"""``sdtune export``: write an artifact in the formats of other programs."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_type_hints

from omegaconf import DictConfig

from sdtune.backbone import Pretrained
from sdtune.config.build import build
from sdtune.config.schema import check_node, check_value
from sdtune.config.settings import kept_config, plain
from sdtune.errors import UserError
from sdtune.exporting import Artifact, Export, find_artifact
from sdtune.paths import is_hub_id
from sdtune.runs.layout import CARD

log = logging.getLogger("sdtune")


def prepare(config: DictConfig, folder: Path) -> Callable[[DictConfig], Any]:
    """Everything that can be refused before weights are loaded."""
    own = plain(config)
    export = Export(
        **{key: _checked(own[key], hint, key) for key, hint in get_type_hints(Export, include_extras=True).items()}
    )
    if (own["run"] is None) == (own["artifact"] is None):
        raise UserError("give the folder of a run, or artifact=FILE and the backbone that it goes onto", key="run")
    if own["push_to"] is not None:
        _check_push(str(own["push_to"]))
    trust = own["trust"]
    if own["run"] is not None:
        run = Path(str(own["run"])).expanduser()
        place, backbone = run / "artifact", kept_config(run)["backbone"]
        card = place / CARD
    else:
        place, backbone, card = Path(str(own["artifact"])).expanduser(), own["backbone"], None
    check_node(backbone, "backbone", trust)
    source = build(backbone, trust)
    artifact = find_artifact(place, "run" if own["run"] is not None else "artifact")
    export.check(artifact)
    if any(entry.suffix != ".log" and not entry.name.startswith(".") for entry in folder.glob("*")):
        raise UserError(
            f"{folder} holds an export already", key="hydra.run.dir", remedy="name another, or leave it out"
        )
    source.check()
    if artifact.kind == "model":
        source.trained(artifact.path).check()
    return lambda composed: execute(export, artifact, source, folder, card, own["push_to"])


def _checked(value: Any, hint: Any, key: str) -> Any:
    check_value(value, hint, key)
    return value


def _check_push(repository: str) -> None:
    if not is_hub_id(repository):
        raise UserError(f"{repository} is no repository of the hub", key="push_to", remedy="give USER/NAME")
    if not os.environ.get("HF_TOKEN"):
        raise UserError(
            "HF_TOKEN is not set", key="push_to", remedy="export it in the environment, with leave to write"
        )


def execute(
    export: Export, artifact: Artifact, source: Pretrained, folder: Path, card: Path | None, push_to: str | None
) -> None:
    """Write, and push where that is asked for."""
    written = export.write(artifact, source, folder)
    if card is not None and card.is_file():
        export.write_card(artifact, card, folder)
    for place in written:
        log.info("%s (%.1f MB)", place, _bytes(place) / 1e6)
    if push_to is not None:
        _push(folder, push_to)


def _bytes(place: Path) -> int:
    return sum(f.stat().st_size for f in (place.rglob("*") if place.is_dir() else [place]) if f.is_file())


def _push(folder: Path, repository: str) -> None:
    """Everything but Hydra's own files and the log: they name folders of this machine."""
    from huggingface_hub import HfApi

    api = HfApi(token=os.environ["HF_TOKEN"])
    try:
        api.create_repo(repository, exist_ok=True, private=True)
        done = api.upload_folder(repo_id=repository, folder_path=folder, ignore_patterns=[".hydra/*", "*.log", ".lock"])
    # The hub's client lets its HTTP library's own errors through, and that library has another name in other releases.
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{repository}: {reason}; what was written stays in {folder}", key="push_to") from error
    log.info("pushed, for you alone to see: %s", json.dumps(str(done)).strip('"'))
