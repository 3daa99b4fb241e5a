"""Scaled copies of images for a report: embedded in the page, or files beside it."""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from sdtune.files import replacing
from sdtune.progress import track

SAMPLE, SHEET = 256, 1000
"""Longer side in pixels of a single image, and of a grid."""


UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)
"""Errors of Pillow for a file that is being written or damaged, or an image that is too large."""


@dataclass(frozen=True)
class Source:
    """Image file, and the longer side of its copy in pixels."""

    file: Path
    side: int = SAMPLE


class ImageStore:
    """WebP copies of images by the content of their files; equal images, such as those of the base model, are one copy.

    A store can serve several pages of the same folder: files that have not changed are not read again.
    """

    def __init__(self) -> None:
        self._copies: dict[str, bytes] = {}
        self._keys: dict[tuple[Source, int], str | None] = {}
        self.folder = ""
        """Folder of the files relative to the page; empty if the images are embedded."""

    def add(self, sources: Sequence[Source]) -> None:
        """Read the images that the store does not have yet."""
        new = [source for source in dict.fromkeys(sources) if self._identity(source) not in self._keys]
        with ThreadPoolExecutor(2) as pool:
            for source, key in track("Reading images", zip(new, pool.map(self._copy, new), strict=True), len(new)):
                self._keys[self._identity(source)] = key

    def _copy(self, source: Source) -> str | None:
        """Key of the copy of ``source``, which is made if the store has no equal image; None if it cannot be read."""
        try:
            content = source.file.read_bytes()
            key = hashlib.sha256(content + str(source.side).encode()).hexdigest()[:16]
            if key not in self._copies:
                self._copies[key] = _small(content, source.side)
        except UNREADABLE:
            return None
        return key

    @staticmethod
    def _identity(source: Source) -> tuple[Source, int]:
        try:
            return source, source.file.stat().st_mtime_ns
        except OSError:
            return source, 0

    def key(self, source: Source) -> str | None:
        """Key of the copy of ``source``; None if its file is unreadable, such as one that is being written."""
        return self._keys.get(self._identity(source))

    def bytes_of(self, keys: Sequence[str]) -> int:
        """Size in bytes of the copies of ``keys`` when they are embedded."""
        return sum(len(self._copies[key]) * 4 // 3 for key in set(keys))

    def url(self, key: str) -> str:
        """Address of a copy in the page."""
        if self.folder:
            return f"{self.folder}/{key}.webp"
        return f"data:image/webp;base64,{base64.b64encode(self._copies[key]).decode()}"

    def write(self, folder: Path, keys: Sequence[str]) -> None:
        """Write the copies of ``keys`` that ``folder`` lacks."""
        folder.mkdir(parents=True, exist_ok=True)
        for key in set(keys):
            if not (folder / f"{key}.webp").exists():
                with replacing(folder / f"{key}.webp", sync=False) as partial:
                    partial.write_bytes(self._copies[key])

    def keep(self, keys: Sequence[str]) -> None:
        """Forget all copies but those of ``keys``."""
        self._keys = {source: key for source, key in self._keys.items() if key is None or key in keys}
        self._copies = {key: copy for key, copy in self._copies.items() if key in keys}


def _small(content: bytes, side: int) -> bytes:
    with Image.open(io.BytesIO(content)) as image:
        small = image.convert("RGB")
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    out = io.BytesIO()
    small.save(out, format="WEBP", quality=85, method=2)
    return out.getvalue()
