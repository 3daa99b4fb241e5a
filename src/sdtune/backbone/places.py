"""Where a backbone's files lie: a folder, a hub id's snapshot; with a VAE from elsewhere, a folder of links."""

from __future__ import annotations

import hashlib
import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path

from sdtune.paths import cache_folder


def local(path: str, key: str) -> Path | None:
    """The folder or file that ``path`` names, None for what can only be a hub id.

    Raises:
        ValueError: it is written as a path, and nothing is there.
    """
    place = Path(path).expanduser()
    if place.exists():
        return place
    if path.startswith(("/", ".", "~")) or path.count("/") != 1 or place.suffix in (".safetensors", ".ckpt"):
        raise ValueError(
            f"{key}: {path} does not exist; name a pipeline folder (diffusers layout), a .safetensors or .ckpt file,"
            " or a hub id"
        )
    return None


def snapshot(path: str, revision: str | None, patterns: list[str], complete: Callable[[Path], bool], key: str) -> Path:
    """The folder of the hub id ``path``: what has been downloaded before if it is ``complete``, else from the hub.

    Raises:
        ValueError: neither is to be had.
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
        raise ValueError(f"{key}: {path} is neither a local folder nor to be had from the hub ({reason})") from error


def with_vae(pipeline: Path, vae: Path) -> Path:
    """A pipeline folder of links, to ``pipeline``'s parts and to the folder ``vae``."""
    name = hashlib.sha256(f"{pipeline.resolve()}\0{vae.resolve()}".encode()).hexdigest()
    target = cache_folder() / "backbones" / f"vae-{name[:32]}"
    wanted = {entry.name: entry.resolve() for entry in pipeline.iterdir() if not entry.name.startswith(".")}
    wanted["vae"] = vae.resolve()
    if target.is_dir() and {link.name: Path(os.path.realpath(link)) for link in target.iterdir()} == wanted:
        return target
    partial = target.with_name(f"{target.name}.{uuid.uuid4().hex}")
    partial.mkdir(parents=True)
    for name, place in wanted.items():
        (partial / name).symlink_to(place, target_is_directory=place.is_dir())
    shutil.rmtree(target, ignore_errors=True)
    try:
        partial.rename(target)
    except OSError:
        # Another process was faster.
        shutil.rmtree(partial)
    return target
