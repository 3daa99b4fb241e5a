"""Locate a backbone's files: a local folder, a snapshot of a hub id, and a VAE from elsewhere."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from filelock import FileLock

from sdtune.backbone.weight_files import weight_files
from sdtune.errors import UserError
from sdtune.files import replacing
from sdtune.paths import cache_folder, is_hub_id


def local(path: str, key: str) -> Path | None:
    """The folder or file that ``path`` names, None for what can only be a hub id.

    Raises:
        UserError: it is written as a path, and nothing is there.
    """
    place = Path(path).expanduser()
    if place.exists():
        return place
    if not is_hub_id(path) or place.suffix in (".safetensors", ".ckpt"):
        raise UserError(
            f"{path} does not exist",
            key=key,
            remedy="name a pipeline folder (diffusers layout), a .safetensors or .ckpt file, or a hub id",
        )
    return None


def snapshot(path: str, revision: str | None, patterns: list[str], complete: Callable[[Path], bool], key: str) -> Path:
    """The folder of the hub id ``path``: what has been downloaded before if it is ``complete``, else from the hub.

    Raises:
        UserError: neither is to be had.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        folder = Path(snapshot_download(path, revision=revision, allow_patterns=patterns, local_files_only=True))
        if complete(folder):
            return folder
    except (LocalEntryNotFoundError, OSError):
        pass  # nothing is here yet
    try:
        return Path(snapshot_download(path, revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{path} is neither a local folder nor to be had from the hub ({reason})", key=key) from error


MODELS = ("text_encoder", "text_encoder_2", "unet", "vae")
"""The folders of a pipeline's models."""


def read_config(file: Path) -> dict[str, Any]:
    """The content of ``file``; UserError for one that cannot be read."""
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read ({error})", key="backbone.path", remedy="copy it again") from error
    if not isinstance(content, dict):
        raise UserError(f"{file} holds no settings by name", key="backbone.path", remedy="copy it again")
    return content


def configured(folder: Path) -> bool:
    """Whether the index of a pipeline ``folder`` and the configs of the models that it names are there."""
    if not (folder / "model_index.json").is_file():
        return False
    index = read_config(folder / "model_index.json")
    named = [name for name in MODELS if (index.get(name) or [None])[0]]
    return all((folder / name / "config.json").is_file() for name in named)


def there(folder: Path, component: str, variant: str | None) -> bool:
    """Whether all weight files of ``component`` are in ``folder``."""
    try:
        return all(file.is_file() for file in weight_files(folder, component, variant))
    except UserError:
        return False


def with_vae(pipeline: Path, vae: Path) -> Path:
    """A pipeline folder of links, to ``pipeline``'s parts and to the folder ``vae``.

    Called by what it links to, so that it is never changed under a process that reads it.
    """
    wanted = {entry.name: entry.resolve() for entry in pipeline.iterdir() if not entry.name.startswith(".")}
    wanted["vae"] = vae.resolve()
    said = json.dumps(sorted((name, str(place)) for name, place in wanted.items()))
    target = cache_folder() / "backbones" / f"vae-{hashlib.sha256(said.encode()).hexdigest()[:32]}"
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.with_name(f"{target.name}.lock")):
        if target.is_dir():
            return target
        with replacing(target, sync=False, alone=True) as partial:
            partial.mkdir()
            for name, place in wanted.items():
                (partial / name).symlink_to(place, target_is_directory=place.is_dir())
    return target
