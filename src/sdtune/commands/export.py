"""``sdtune export``: write an artifact in the formats of other programs, and publish it on the Hugging Face Hub."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, get_type_hints

from huggingface_hub import HfApi, get_token
from omegaconf import DictConfig

from sdtune.backbone import Pretrained
from sdtune.config.build import build
from sdtune.config.schema import check_node, check_value
from sdtune.config.settings import plain, read_saved_config
from sdtune.errors import UserError
from sdtune.exporting import Artifact, Export, find_artifact
from sdtune.exporting.previews import add_gallery, last_samples
from sdtune.files import is_partial, is_snapshot, replacing
from sdtune.paths import is_hub_id
from sdtune.progress import phase
from sdtune.runs.hydra_values import current_overrides
from sdtune.runs.layout import CARD

log = logging.getLogger("sdtune")

_NOT_SENT = (".hydra/*", "*.log", ".lock")
"""Files of a run that contain paths of this machine."""


@dataclass(frozen=True)
class Push:
    """Upload to the Hugging Face Hub.

    Args:
        repository: ``USER/NAME``.
        private: whether a new repository is private.
        dry_run: only print what would be sent.
    """

    repository: str
    private: bool
    dry_run: bool


def prepare(config: DictConfig, folder: Path) -> Callable[[DictConfig], Any]:
    """Check ``config`` without loading weights, and return the function that exports."""
    options = plain(config, ("backbone",))
    export, push = _export(options), _push(options)
    if (options["run"] is None) == (options["artifact"] is None):
        raise UserError(
            "exactly one of run and artifact is required",
            key="run",
            remedy="use sdtune export RUN, or artifact=FILE and its backbone",
        )
    run = None if options["run"] is None else Path(str(options["run"])).expanduser()
    if run is not None:
        path, backbone = run / "artifact", read_saved_config(run)["backbone"]
        if any(text.startswith("backbone.path=") for text in current_overrides()):
            backbone["path"] = options["backbone"]["path"]  # the model has moved
    else:
        path, backbone = Path(str(options["artifact"])).expanduser(), options["backbone"]
    artifact = find_artifact(path, "artifact" if run is None else "run")
    source = _source(backbone, artifact, options["trust"], export)
    _check_folder(folder)

    if export is not None and export.thumbnail and not (run is not None and last_samples(run)):
        raise UserError(
            "there is no sample image", key="thumbnail", remedy="set run=RUN with samples, or remove thumbnail"
        )

    def start(composed: DictConfig) -> None:
        with phase("Exporting"):
            if export is None:
                _copy_artifact(path, folder)
            else:
                _convert(export, artifact, source, folder, run)
        add_gallery(folder, [] if run is None else last_samples(run))
        log.info("exported to %s", folder)
        if push is not None:
            _send(folder, push)

    return start


def _check_folder(folder: Path) -> None:
    if any(entry.suffix != ".log" and not entry.name.startswith(".") for entry in folder.glob("*")):
        raise UserError(
            f"{folder} already contains an export",
            key="hydra.run.dir",
            remedy="use another folder or remove this override",
        )


def _convert(export: Export, artifact: Artifact, source: Pretrained, folder: Path, run: Path | None) -> None:
    """Write ``artifact`` in the format of ``export``, with the model card of ``run``."""
    for target in export.write(artifact, source, folder, [] if run is None else last_samples(run)):
        log.info("%s (%s)", target, _size(target))
    if run is not None and (card := run / "artifact" / CARD).is_file():
        export.write_card(artifact, card, folder)


def _export(options: Mapping[str, Any]) -> Export | None:
    """Settings of the export; None for the files of the artifact as they are."""
    hints = get_type_hints(Export, include_extras=True)
    if options["format"] is not None:
        return Export(**{key: _checked_value(options[key], hint, key) for key, hint in hints.items()})
    for setting in fields(Export):
        if setting.name != "format" and options[setting.name] != setting.default:
            raise UserError(
                "applies only to an export in another format",
                key=setting.name,
                remedy=f"set format=kohya, diffusers, pipeline or single_file, or remove {setting.name}",
            )
    return None


def _source(
    backbone: Mapping[str, Any], artifact: Artifact, trust: tuple[str, ...], export: Export | None
) -> Pretrained:
    """The backbone of ``artifact``; checked if the export needs its weights."""
    check_node(backbone, "backbone", trust)
    source: Pretrained = build(dict(backbone), trust)
    if export is not None:
        export.check(artifact)
        source.check()
        if artifact.kind == "model":
            source.of_trained_pipeline(artifact.path).check()
    return source


def _checked_value(value: Any, hint: Any, key: str) -> Any:
    check_value(value, hint, key)
    return value


def _push(options: Mapping[str, Any]) -> Push | None:
    private, dry_run = (_checked_value(options[key], bool, key) for key in ("push_private", "dry_run"))
    if options["push_to"] is None:
        if dry_run:
            raise UserError("applies only to an upload", key="dry_run", remedy="set push_to=USER/NAME")
        return None
    repository = str(options["push_to"])
    if not is_hub_id(repository):
        raise UserError(
            f"{repository} is not a repository of the Hugging Face Hub", key="push_to", remedy="use USER/NAME"
        )
    if not dry_run and get_token() is None:
        raise UserError(
            "no login of the Hugging Face Hub",
            key="push_to",
            remedy="set HF_TOKEN in the environment to a token with write access, or run: hf auth login",
        )
    return Push(repository, private, dry_run)


def _bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in (path.rglob("*") if path.is_dir() else [path]) if file.is_file())


def _size(path: Path) -> str:
    count = _bytes(path)
    return f"{count / 1e6:.1f} MB" if count >= 1e5 else f"{count / 1e3:.1f} kB"


def _copy_artifact(path: Path, folder: Path) -> None:
    """Copy the final files of the artifact at ``path``, which is a file or a folder, without snapshots."""
    for entry in sorted(path.iterdir()) if path.is_dir() and not (path / "config.json").is_file() else [path]:
        if is_partial(entry) or is_snapshot(entry.stem):
            continue
        with replacing(folder / entry.name) as partial:
            if entry.is_dir():
                shutil.copytree(entry, partial, dirs_exist_ok=True)
            else:
                shutil.copyfile(entry, partial)
        log.info("%s (%s)", folder / entry.name, _size(entry))


def _send(folder: Path, push: Push) -> None:
    """Upload ``folder`` without Hydra's files and the log, since these contain paths of this machine."""
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    # As upload_folder matches its patterns.
    sent = [file for file in files if not any(fnmatch(file.relative_to(folder).as_posix(), p) for p in _NOT_SENT)]
    if push.dry_run:
        kind = "private" if push.private else "public"
        log.info("dry run: to %s (%s if it is new), %d files:", push.repository, kind, len(sent))
        for file in sent:
            log.info("  %s (%s)", file.relative_to(folder), _size(file))
        log.info("nothing was sent")
        return
    api = HfApi()  # HF_TOKEN, or the stored login
    try:
        api.create_repo(push.repository, exist_ok=True, private=push.private)
        with phase(f"Uploading to {push.repository}"):
            commit = api.upload_folder(repo_id=push.repository, folder_path=folder, ignore_patterns=list(_NOT_SENT))
    # huggingface_hub raises errors of its HTTP library, which is requests or httpx, depending on the release.
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"{push.repository}: {reason}", key="push_to", remedy=f"upload the exported files in {folder} yourself"
        ) from error
    log.info(
        "pushed (new repositories are %s): %s",
        "private" if push.private else "public",
        json.dumps(str(commit)).strip('"'),
    )
