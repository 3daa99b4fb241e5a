"""Locate a backbone's files: a local folder, a hub snapshot, and a VAE from another source."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock

from sdtune.backbone.weight_files import weight_files
from sdtune.errors import UserError
from sdtune.files import mark_used, read_json, replacing
from sdtune.paths import cache_folder, is_hub_id


def find_local(path: str, key: str) -> Path | None:
    """Local folder or file at ``path``; None if ``path`` can only be a hub id.

    Raises:
        UserError: ``path`` is not a hub id and does not exist.
    """
    local_path = Path(path).expanduser()
    if local_path.exists():
        return local_path
    if not is_hub_id(path) or local_path.suffix in (".safetensors", ".ckpt"):
        raise UserError(
            f"{path} does not exist",
            key=key,
            remedy="use a pipeline folder (diffusers layout), a .safetensors or .ckpt file, or a hub id",
        )
    return None


def hub_folder(
    path: str, revision: str | None, patterns: list[str], is_complete: Callable[[Path], bool], key: str
) -> Path:
    """Local snapshot folder of the hub id ``path``: from the hub cache if ``is_complete``, else downloaded.

    Raises:
        UserError: the snapshot is neither cached nor downloadable.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        folder = Path(snapshot_download(path, revision=revision, allow_patterns=patterns, local_files_only=True))
        if is_complete(folder):
            return folder
    except (LocalEntryNotFoundError, OSError):
        pass  # not in the cache
    try:
        return Path(snapshot_download(path, revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"{path} is neither a local folder nor available from the hub ({reason})",
            key=key,
            remedy="use a folder, a file or a hub id",
        ) from error


MODELS = ("text_encoder", "text_encoder_2", "text_encoder_3", "transformer", "unet", "vae")
"""Folder names of a pipeline's models."""


def read_config(file: Path) -> dict[str, Any]:
    """Read a JSON config; raise UserError if it is unreadable or not an object."""
    return read_json(file, "backbone.path", "copy or download it again")


def has_all_configs(folder: Path) -> bool:
    """Whether the pipeline ``folder`` has an index and the configs of all models listed in it."""
    if not (folder / "model_index.json").is_file():
        return False
    index = read_config(folder / "model_index.json")
    models = [name for name in MODELS if (index.get(name) or [None])[0]]
    return all((folder / name / "config.json").is_file() for name in models)


def has_weight_files(folder: Path, component: str, variant: str | None) -> bool:
    """Whether all weight files of ``component`` exist in ``folder``."""
    try:
        return all(file.is_file() for file in weight_files(folder, component, variant))
    except UserError:
        return False


def _link(path: Path, target: Path) -> None:
    """Symbolic link to ``target``, or a copy where the user may not create links, as on Windows by default."""
    try:
        path.symlink_to(target, target_is_directory=target.is_dir())
    except OSError:
        if target.is_dir():
            shutil.copytree(target, path)
        else:
            shutil.copyfile(target, path)


def with_parts(pipeline: Path, parts: Mapping[str, Path]) -> Path:
    """Pipeline folder of symbolic links to the folders of ``pipeline``, and to ``parts``, which replace some of them.

    Its name is a hash of the link targets, so an existing folder is never changed while another process reads it.
    """
    targets = {entry.name: entry.resolve() for entry in pipeline.iterdir() if not entry.name.startswith(".")}
    targets |= {name: folder.resolve() for name, folder in parts.items()}
    cache_key = json.dumps(sorted((name, str(linked)) for name, linked in targets.items()))
    target = cache_folder() / "backbones" / f"parts-{hashlib.sha256(cache_key.encode()).hexdigest()[:32]}"
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.with_name(f"{target.name}.lock")):
        if target.is_dir():
            mark_used(target)
            return target
        with replacing(target, sync=False, alone=True) as partial:
            partial.mkdir()
            for name, linked in targets.items():
                _link(partial / name, linked)
    return target
