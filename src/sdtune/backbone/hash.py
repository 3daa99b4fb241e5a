"""A name for a backbone's weights that survives renaming, re-sharding and copying."""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import struct
from collections.abc import Sequence
from pathlib import Path

from sdtune.paths import cache_folder

_CHUNK = 1 << 24


def _tensors(file: Path) -> dict[str, tuple[str, list[int], int, int]]:
    """Key -> (dtype, shape, first byte, byte after the last) in a safetensors ``file``."""
    with file.open("rb") as handle:
        head = handle.read(8)
        size = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
        if not 0 < size <= file.stat().st_size - 8:
            raise ValueError(f"{file}: not a safetensors file, or a truncated one; copy or download it again")
        try:
            header = json.loads(handle.read(size))
        except ValueError as error:
            raise ValueError(f"{file}: its safetensors header cannot be read; copy or download it again") from error
    header.pop("__metadata__", None)
    entries = {}
    for key, entry in header.items():
        first, last = entry["data_offsets"]
        entries[key] = (entry["dtype"], entry["shape"], first + 8 + size, last + 8 + size)
    if max((last for *_, last in entries.values()), default=0) > file.stat().st_size:
        raise ValueError(f"{file}: truncated safetensors file; copy or download it again")
    return entries


def weight_files(folder: Path, component: str) -> list[Path]:
    """The safetensors files that hold ``component``: one file, or the shards that its index names."""
    for stem in ("diffusion_pytorch_model", "model"):
        single = folder / component / f"{stem}.safetensors"
        if single.is_file():
            return [single]
        index = folder / component / f"{stem}.safetensors.index.json"
        if index.is_file():
            shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            return [folder / component / shard for shard in shards]
    raise ValueError(
        f"backbone.path: {folder / component} holds no diffusion_pytorch_model.safetensors or model.safetensors"
    )


def check_weights(folder: Path, components: Sequence[str]) -> None:
    """ValueError where a component's weights are missing or cut short; reads headers alone."""
    for component in components:
        for file in weight_files(folder, component):
            if not file.is_file():
                raise ValueError(f"backbone.path: {file} is missing, which its index names; copy it too")
            _tensors(file)


def weights_hash(folder: Path, components: Sequence[str]) -> str:
    """sha256 over sorted (component, key, dtype, shape, bytes) of the files' tensors.

    Reading several gigabytes takes seconds, so the answer is kept by the files' path, size and time of change.
    """
    found = [(name, file) for name in sorted(components) for file in weight_files(folder, name)]
    states = [(name, str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for name, file in found]
    kept = cache_folder() / "hashes" / hashlib.sha256(json.dumps(states).encode()).hexdigest()
    if kept.is_file():
        return kept.read_text()
    digest = hashlib.sha256()
    for name in sorted(components):
        places = [(key, file, entry) for n, file in found if n == name for key, entry in _tensors(file).items()]
        maps: dict[Path, mmap.mmap] = {}
        for key, file, (dtype, shape, first, last) in sorted(places, key=lambda place: place[0]):
            digest.update(f"{name}\0{key}\0{dtype}\0{shape}\0".encode())
            if file not in maps:
                with file.open("rb") as handle:
                    maps[file] = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
            for start in range(first, last, _CHUNK):
                digest.update(maps[file][start : min(last, start + _CHUNK)])
        for opened in maps.values():
            opened.close()
    kept.parent.mkdir(parents=True, exist_ok=True)
    partial = kept.with_name(f"{kept.name}.{os.getpid()}")
    partial.write_text(digest.hexdigest())
    partial.replace(kept)
    return digest.hexdigest()
