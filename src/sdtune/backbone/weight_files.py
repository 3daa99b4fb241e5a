"""Safetensors weight files of a backbone: lookup, header checks, and a hash independent of file names and shards."""

from __future__ import annotations

import contextlib
import hashlib
import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path

from sdtune.errors import UserError
from sdtune.files import mark_used, replacing
from sdtune.formats.files import read_metadata
from sdtune.formats.keys import canonical_key, is_redundant
from sdtune.formats.pipeline import STEMS
from sdtune.paths import cache_folder

_CHUNK = 1 << 24

Files = Mapping[str, Sequence[Path]]
"""Safetensors files of each component."""


def _read_header(file: Path) -> dict[str, tuple[str, list[int], int, int]]:
    """Header of a safetensors ``file``: key -> (dtype, shape, first byte, end byte)."""
    with file.open("rb") as handle:
        length_bytes = handle.read(8)
        size = struct.unpack("<Q", length_bytes)[0] if len(length_bytes) == 8 else 0
        if not 0 < size <= file.stat().st_size - 8:
            raise UserError(f"{file}: not a safetensors file, or a truncated one", remedy="copy or download it again")
        try:
            header = json.loads(handle.read(size))
            header.pop("__metadata__", None)
            entries = {key: _parse_entry(entry, 8 + size) for key, entry in header.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{file}: the safetensors header cannot be read", remedy="copy or download it again"
            ) from error
    if max((last for *_, last in entries.values()), default=0) > file.stat().st_size:
        raise UserError(f"{file}: truncated safetensors file", remedy="copy or download it again")
    return entries


def _parse_entry(entry: Mapping[str, object], start: int) -> tuple[str, list[int], int, int]:
    offsets, shape = entry["data_offsets"], entry["shape"]
    if not isinstance(offsets, list) or not isinstance(shape, list):
        raise TypeError("data_offsets and shape must be lists of numbers")
    first, last = offsets
    return str(entry["dtype"]), shape, int(first) + start, int(last) + start


def shapes(files: Sequence[Path], component: str) -> dict[str, list[int]]:
    """Shape of each tensor in ``files``, by canonical key; reads only the headers."""
    return {
        canonical_key(component, key): shape
        for file in files
        for key, (_, shape, *_) in _read_header(file).items()
        if not is_redundant(key)
    }


def weight_files(folder: Path, component: str, variant: str | None = None) -> list[Path]:
    """Safetensors files of ``component``: one file, or the shards listed in its index.

    Args:
        folder: pipeline folder.
        component: subfolder of the component.
        variant: weight variant as in diffusers, such as ``fp16``: the file is ``<stem>.fp16.safetensors``. If None, the
            files without a variant; if there are none, the files of the only variant.

    Raises:
        UserError: the component has no such safetensors files.
    """
    subfolder = folder / component
    if files := _files(subfolder, variant):
        return files
    if variant is None:
        variants = sorted(
            {file.name.split(".")[1] for stem in STEMS for file in subfolder.glob(f"{stem}.*.safetensors")}
        )
        if len(variants) == 1 and (files := _files(subfolder, variants[0])):
            return files
    suffix = f".{variant}" if variant else ""
    pickles = [file.name for file in sorted(subfolder.glob("*.bin"))]
    reason = f"; {pickles[0]} is a pickle, which can execute code, and is not read" if pickles else ""
    raise UserError(
        f"{subfolder} contains no diffusion_pytorch_model{suffix}.safetensors or model{suffix}.safetensors{reason}",
        key="backbone.path",
        remedy="copy or download the weights as safetensors",
    )


def _files(subfolder: Path, variant: str | None) -> list[Path]:
    suffix = f".{variant}" if variant else ""
    for stem in STEMS:
        single, index = subfolder / f"{stem}{suffix}.safetensors", subfolder / f"{stem}.safetensors.index{suffix}.json"
        if single.is_file():
            return [single]
        if index.is_file():
            return [subfolder / shard for shard in _shards(index)]
    return []


def _shards(index: Path) -> list[str]:
    try:
        return sorted({str(shard) for shard in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{index} cannot be read ({error})", key="backbone.path", remedy="copy or download it again"
        ) from error


def variant_of(files: Sequence[Path]) -> str | None:
    """Weight variant of ``files`` (from :func:`weight_files`), in the form that ``from_pretrained`` expects."""
    name = files[0].name.split("-000")[0].removesuffix(".safetensors")
    return name.partition(".")[2] or None


def check_files(files: Files) -> None:
    """Raise UserError if weight files are missing or truncated; reads only the headers."""
    for component_files in files.values():
        for file in component_files:
            if not file.is_file():
                raise UserError(
                    f"{file} is listed in the index, but is missing", key="backbone.path", remedy="copy it as well"
                )
            read_metadata(file)  # safetensors checks the header against the file size


def weights_hash(files: Files) -> str:
    """SHA-256 over sorted (component, canonical key, dtype, shape, bytes) of all tensors in ``files``.

    Hashing several gigabytes takes seconds, so the result is cached by path, size and modification time of the files.
    """
    located = [(name, file) for name in sorted(files) for file in files[name]]
    states = [(name, str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for name, file in located]
    cache_file = cache_folder() / "hashes" / hashlib.sha256(json.dumps(states).encode()).hexdigest()
    if cache_file.is_file():
        mark_used(cache_file)
        return cache_file.read_text(encoding="utf-8")
    digest = hashlib.sha256()
    for name in sorted(files):
        tensors = [
            (canonical_key(name, key), file, entry)
            for file in files[name]
            for key, entry in _read_header(file).items()
            if not is_redundant(key)
        ]
        with contextlib.ExitStack() as stack:
            # Read instead of memory-map: mapped pages count as resident memory, in addition to the loaded weights.
            handles = {file: stack.enter_context(file.open("rb")) for file in files[name]}
            for key, file, (dtype, shape, first, last) in sorted(tensors, key=lambda tensor: tensor[0]):
                digest.update(f"{name}\0{key}\0{dtype}\0{shape}\0".encode())
                handles[file].seek(first)
                for start in range(first, last, _CHUNK):
                    digest.update(handles[file].read(min(last - start, _CHUNK)))
    with replacing(cache_file, sync=False) as partial:
        partial.write_text(digest.hexdigest(), encoding="utf-8")
    return digest.hexdigest()
