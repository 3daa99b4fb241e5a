"""Hash of a backbone's weights: independent of file names, sharding, copies and layout."""

from __future__ import annotations

import contextlib
import hashlib
import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path

from sdtune.errors import UserError
from sdtune.files import replacing
from sdtune.formats.files import read_metadata
from sdtune.formats.keys import canonical_key, is_buffer
from sdtune.formats.pipeline import STEMS
from sdtune.paths import cache_folder

_CHUNK = 1 << 24

Files = Mapping[str, Sequence[Path]]
"""The safetensors files that hold each component."""


def _tensors(file: Path) -> dict[str, tuple[str, list[int], int, int]]:
    """Key -> (dtype, shape, first byte, byte after the last) in a safetensors ``file``."""
    with file.open("rb") as handle:
        head = handle.read(8)
        size = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
        if not 0 < size <= file.stat().st_size - 8:
            raise UserError(f"{file}: not a safetensors file, or a truncated one", remedy="copy or download it again")
        try:
            header = json.loads(handle.read(size))
            header.pop("__metadata__", None)
            entries = {key: _entry(entry, 8 + size) for key, entry in header.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{file}: its safetensors header cannot be read", remedy="copy or download it again"
            ) from error
    if max((last for *_, last in entries.values()), default=0) > file.stat().st_size:
        raise UserError(f"{file}: truncated safetensors file", remedy="copy or download it again")
    return entries


def _entry(entry: Mapping[str, object], start: int) -> tuple[str, list[int], int, int]:
    offsets, shape = entry["data_offsets"], entry["shape"]
    if not isinstance(offsets, list) or not isinstance(shape, list):
        raise TypeError("data_offsets and shape are lists of numbers")
    first, last = offsets
    return str(entry["dtype"]), shape, int(first) + start, int(last) + start


def shapes(files: Sequence[Path], component: str) -> dict[str, list[int]]:
    """The shape of each tensor in ``files``, by canonical key; headers alone are read."""
    return {
        canonical_key(component, key): shape
        for file in files
        for key, (_, shape, *_) in _tensors(file).items()
        if not is_buffer(key)
    }


def weight_files(folder: Path, component: str, variant: str | None = None) -> list[Path]:
    """The safetensors files that hold ``component``: one file, or the shards that its index names.

    Args:
        folder: of the pipeline.
        component: its sub-folder.
        variant: as in diffusers, such as ``fp16``: the file is ``<stem>.fp16.safetensors``. If None, the files without
            one, and where there are none those of the only variant there is.
    """
    place = folder / component
    if found := _files(place, variant):
        return found
    if variant is None:
        others = sorted({file.name.split(".")[1] for stem in STEMS for file in place.glob(f"{stem}.*.safetensors")})
        if len(others) == 1 and (found := _files(place, others[0])):
            return found
    mark = f".{variant}" if variant else ""
    pickles = [file.name for file in sorted(place.glob("*.bin"))]
    reason = f"; {pickles[0]} is a pickle, which can carry code, and is not read" if pickles else ""
    raise UserError(
        f"{place} holds no diffusion_pytorch_model{mark}.safetensors or model{mark}.safetensors{reason}",
        key="backbone.path",
    )


def _files(place: Path, variant: str | None) -> list[Path]:
    mark = f".{variant}" if variant else ""
    for stem in STEMS:
        single, index = place / f"{stem}{mark}.safetensors", place / f"{stem}.safetensors.index{mark}.json"
        if single.is_file():
            return [single]
        if index.is_file():
            return [place / shard for shard in _shards(index)]
    return []


def _shards(index: Path) -> list[str]:
    try:
        return sorted({str(shard) for shard in json.loads(index.read_text())["weight_map"].values()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index} cannot be read ({error})", key="backbone.path", remedy="copy it again") from error


def variant_of(files: Sequence[Path]) -> str | None:
    """The variant whose files :func:`weight_files` found, as ``from_pretrained`` wants it named."""
    name = files[0].name.split("-000")[0].removesuffix(".safetensors")
    return name.partition(".")[2] or None


def check_files(files: Files) -> None:
    """UserError where a component's weights are missing or cut short; reads headers alone."""
    for each in files.values():
        for file in each:
            if not file.is_file():
                raise UserError(f"{file} is missing, which its index names", key="backbone.path", remedy="copy it too")
            read_metadata(file)  # safetensors' own reader holds sizes and types against one another


def weights_hash(files: Files) -> str:
    """sha256 over sorted (component, canonical key, dtype, shape, bytes) of the files' tensors.

    Reading several gigabytes takes seconds, so the answer is kept by the files' path, size and time of change.
    """
    found = [(name, file) for name in sorted(files) for file in files[name]]
    states = [(name, str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for name, file in found]
    kept = cache_folder() / "hashes" / hashlib.sha256(json.dumps(states).encode()).hexdigest()
    if kept.is_file():
        return kept.read_text()
    digest = hashlib.sha256()
    for name in sorted(files):
        places = [
            (canonical_key(name, key), file, entry)
            for file in files[name]
            for key, entry in _tensors(file).items()
            if not is_buffer(key)
        ]
        with contextlib.ExitStack() as opened:
            # Read and not mapped: what is mapped counts as resident, beside the weights that may be in memory by now.
            handles = {file: opened.enter_context(file.open("rb")) for file in files[name]}
            for key, file, (dtype, shape, first, last) in sorted(places, key=lambda place: place[0]):
                digest.update(f"{name}\0{key}\0{dtype}\0{shape}\0".encode())
                handles[file].seek(first)
                for start in range(first, last, _CHUNK):
                    digest.update(handles[file].read(min(last - start, _CHUNK)))
    with replacing(kept, sync=False) as partial:
        partial.write_text(digest.hexdigest())
    return digest.hexdigest()
